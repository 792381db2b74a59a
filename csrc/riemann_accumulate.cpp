#include "riemann_accumulate.h"

#include <algorithm>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mipfast {
namespace {

// Neurons per task: as many as keep both sums in the L1 cache (20 x 64 x 11008 fp32, one core: 2048 neurons 2.3 ms,
// 4096 1.8, 8192 1.9), or fewer, so that every thread gets a task. Sums do not depend on it: a multiple of kTile.
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

// A sweep over the sums takes up to kSteps steps and keeps kTile neurons of each sum in registers. 20 x 64 x 11008
// fp32 / bf16, one core, from cold caches: one step at a time 4 / 3 ms, 4 steps 2.1 / 1.4, 8 steps 1.9 / 1.1, all 20
// at once 2.4 / 1.9 (more streams than the core's prefetcher follows). Without the prefetch 8 steps take 2.3 / 1.5.
// Not into the first-level cache: where steps are a multiple of 4 KiB apart all streams fall into its one set of 8
// lines (Zen 4, fp32: 3.8 ms into it, 3.1 without, 2.65 into the second).
constexpr int64_t kTile = 32;
constexpr int kSteps = 8;
constexpr int64_t kPrefetchBytes = 4096;

struct Ones {
  float operator[](int64_t) const { return 1.f; }
  Ones operator+(int64_t) const { return {}; }
};

template <int Steps, int64_t Lanes, typename Grad, typename Act>
MIPFAST_INLINE void add_tile(const Grad* grad, int64_t step_stride, const float* weights, Act act,
                             float* __restrict sum1, float* __restrict sum2, bool fresh) {
  float part1[Lanes] = {}, part2[Lanes] = {};
  for (int k = 0; k < Steps; ++k) {
    const Grad* step = grad + k * step_stride;
    for (int64_t byte = 0; byte < Lanes * int64_t{sizeof(Grad)}; byte += 64)
      MIPFAST_PREFETCH(reinterpret_cast<const char*>(step) + kPrefetchBytes + byte);
    for (int64_t f = 0; f < Lanes; ++f) {
      const float g = widen(step[f]);
      const float wg = weights[k] * g;
      part1[f] += wg;
      part2[f] += wg * g;
    }
  }
  for (int64_t f = 0; f < Lanes; ++f) sum1[f] = (fresh ? 0.f : sum1[f]) + widen(act[f]) * part1[f];
  for (int64_t f = 0; f < Lanes; ++f) sum2[f] = (fresh ? 0.f : sum2[f]) + part2[f];
}

template <int Steps, typename Grad, typename Act>
MIPFAST_INLINE void add_steps(const Grad* grad, int64_t steps, int64_t step_stride, const float* weights, Act act,
                              float* sum1, float* sum2, int64_t width, bool fresh) {
  for (; steps >= Steps; steps -= Steps, grad += Steps * step_stride, weights += Steps, fresh = false) {
    int64_t f = 0;
    for (; f + kTile <= width; f += kTile)
      add_tile<Steps, kTile>(grad + f, step_stride, weights, act + f, sum1 + f, sum2 + f, fresh);
    for (; f + 4 <= width; f += 4)
      add_tile<Steps, 4>(grad + f, step_stride, weights, act + f, sum1 + f, sum2 + f, fresh);
    for (; f < width; ++f)
      add_tile<Steps, 1>(grad + f, step_stride, weights, act + f, sum1 + f, sum2 + f, fresh);
  }
  if constexpr (Steps > 1)
    add_steps<Steps / 2>(grad, steps, step_stride, weights, act, sum1, sum2, width, fresh);
}

// A lambda in here would be compiled for plain x86-64.
template <typename Grad, typename Act>
MIPFAST_CLONES void add_row(const Grad* grad, int64_t steps, int64_t step_stride, const float* weights, Act act,
                            float* sum1, float* sum2, int64_t width, bool fresh) {
  add_steps<kSteps>(grad, steps, step_stride, weights, act, sum1, sum2, width, fresh);
}

template <typename Grad, typename Act>
void run(const Grad* grad, const float* weights, Act act, float* s1, float* s2, int64_t steps, int64_t groups,
         int64_t rows_per_group, int64_t neurons) {
  if (rows_per_group == 1) neurons *= std::exchange(groups, 1);  // nothing to sum over: one long row
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

    for (int64_t begin = 0; begin < rows_per_group; begin += kRowsPerChain) {
      const int64_t end = std::min(begin + kRowsPerChain, rows_per_group);
      float* sum1 = begin ? chain1 : total1;
      float* sum2 = begin ? chain2 : total2;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t offset = (group * rows_per_group + p) * neurons + first;
        add_row(grad + offset, steps, step_stride, weights, act + offset, sum1, sum2, width, p == begin);
      }
      if (!begin) continue;
      for (int64_t f = 0; f < width; ++f) total1[f] += chain1[f];
      for (int64_t f = 0; f < width; ++f) total2[f] += chain2[f];
    }
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
