#include "riemann_accumulate.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "widen.h"

namespace mipfast {
namespace {

// Neurons per task. Long runs stream best (20 x 64 x 11008 fp32, one core: 512 neurons 14.1 GB/s, 4096 14.9; one
// group of 1024 rows of 3420: 8.3 and 16.4), short ones give every thread a task; the sums do not depend on it.
constexpr int64_t kLargestBlock = 4096;
constexpr int64_t kSmallestBlock = 512;

int64_t block_for(int64_t groups, int64_t neurons) {
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  int64_t block = kLargestBlock;
  while (block > kSmallestBlock && groups * ((neurons + block - 1) / block) < threads) block /= 2;
  return block;
}

// Vision groups hold thousands of rows, where one fp32 chain of n sums loses about sqrt(n) ulps: chains of this
// many rows, then a chain of their totals.
constexpr int64_t kRowsPerChain = 64;

struct Ones {
  float operator[](int64_t) const { return 1.f; }
  Ones operator+(int64_t) const { return {}; }
};

template <int Steps, typename Grad, typename Act>
void add_steps(const Grad* grad, int64_t step_stride, const float* weights, Act act, float* __restrict sum1,
               float* __restrict sum2, int64_t width) {
  for (int64_t f = 0; f < width; ++f) {
    float part1 = 0.f, part2 = 0.f;
    for (int k = 0; k < Steps; ++k) {
      const float g = widen(grad[k * step_stride + f]);
      const float wg = weights[k] * g;
      part1 += wg;
      part2 += wg * g;
    }
    sum1[f] += widen(act[f]) * part1;
    sum2[f] += part2;
  }
}

// Four steps to a sweep over the buffers: one at a time, their traffic made it slower than good eager (0.8x).
template <typename Grad, typename Act>
void add_row(const Grad* grad, int64_t steps, int64_t step_stride, const float* weights, Act act, float* sum1,
             float* sum2, int64_t width) {
  for (; steps >= 4; steps -= 4, grad += 4 * step_stride, weights += 4)
    add_steps<4>(grad, step_stride, weights, act, sum1, sum2, width);
  if (steps == 3) add_steps<3>(grad, step_stride, weights, act, sum1, sum2, width);
  if (steps == 2) add_steps<2>(grad, step_stride, weights, act, sum1, sum2, width);
  if (steps == 1) add_steps<1>(grad, step_stride, weights, act, sum1, sum2, width);
}

template <typename Grad, typename Act>
void run(const Grad* grad, const float* weights, Act act, float* s1, float* s2, int64_t steps, int64_t groups,
         int64_t rows_per_group, int64_t neurons) {
  const int64_t block = block_for(groups, neurons);
  const int64_t blocks = (neurons + block - 1) / block;
  const int64_t step_stride = groups * rows_per_group * neurons;

#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < groups * blocks; ++task) {
    const int64_t group = task / blocks;
    const int64_t first = (task % blocks) * block;
    const int64_t width = std::min(block, neurons - first);
    float chain1[kLargestBlock], chain2[kLargestBlock];
    float* total1 = s1 + group * neurons + first;
    float* total2 = s2 + group * neurons + first;
    std::fill_n(total1, width, 0.f);
    std::fill_n(total2, width, 0.f);

    for (int64_t begin = 0; begin < rows_per_group; begin += kRowsPerChain) {
      const int64_t end = std::min(begin + kRowsPerChain, rows_per_group);
      std::fill_n(chain1, width, 0.f);
      std::fill_n(chain2, width, 0.f);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t offset = (group * rows_per_group + p) * neurons + first;
        add_row(grad + offset, steps, step_stride, weights, act + offset, chain1, chain2, width);
      }
      for (int64_t f = 0; f < width; ++f) total1[f] += chain1[f];
      for (int64_t f = 0; f < width; ++f) total2[f] += chain2[f];
    }
  }
}

template <typename Then>
void with_type(Dtype dtype, const void* data, Then then) {
  switch (dtype) {
    case Dtype::float32: return then(static_cast<const float*>(data));
    case Dtype::bfloat16: return then(static_cast<const BFloat16*>(data));
    case Dtype::float16: return then(static_cast<const Float16*>(data));
  }
}

}  // namespace

void riemann_accumulate(const void* grad, Dtype grad_dtype, const float* weights, const void* act,
                        Dtype act_dtype, float* s1, float* s2, int64_t steps, int64_t groups,
                        int64_t rows_per_group, int64_t neurons) {
  with_type(grad_dtype, grad, [&](auto* g) {
    if (!act) return run(g, weights, Ones{}, s1, s2, steps, groups, rows_per_group, neurons);
    with_type(act_dtype, act, [&](auto* a) {
      run(g, weights, a, s1, s2, steps, groups, rows_per_group, neurons);
    });
  });
}

}  // namespace mipfast
