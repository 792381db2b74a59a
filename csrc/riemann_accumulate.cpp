#include "riemann_accumulate.h"

#include <algorithm>

#include "widen.h"

namespace mipfast {
namespace {

// 1024 neurons: the six fp32 buffers (24 KiB) stay near the core while the gradient streams by once.
// 256 neurons and one step at a time measured 0.8x of good eager; 1024 and four steps 2.1x.
constexpr int64_t kBlock = 1024;
constexpr int64_t kUnroll = 4;

struct Block {
  float row1[kBlock], row2[kBlock];    // this row's sums over the steps
  float sum1[kBlock], sum2[kBlock];    // sums over the rows seen so far
  float lost1[kBlock], lost2[kBlock];  // what rounding has taken from sum1, sum2 (Kahan)
};

template <typename Grad, int Steps>
void add_steps(const Grad* grad, int64_t step_stride, const float* weights, Block& b, int64_t width) {
  for (int64_t f = 0; f < width; ++f) {
    float row1 = b.row1[f], row2 = b.row2[f];
    for (int k = 0; k < Steps; ++k) {
      const float g = widen(grad[k * step_stride + f]);
      const float wg = weights[k] * g;
      row1 += wg;
      row2 += wg * g;
    }
    b.row1[f] = row1;
    b.row2[f] = row2;
  }
}

// Vision groups hold thousands of rows, where a plain fp32 chain of n sums loses about sqrt(n) ulps.
inline void compensated_add(float& sum, float& lost, float term) {
  const float y = term - lost;
  const float next = sum + y;
  lost = (next - sum) - y;
  sum = next;
}

template <typename Grad, typename Act>
void run(const Grad* grad, const float* weights, const Act* act, float* s1, float* s2, int64_t steps,
         int64_t groups, int64_t rows_per_group, int64_t neurons) {
  const int64_t blocks = (neurons + kBlock - 1) / kBlock;
  const int64_t step_stride = groups * rows_per_group * neurons;

#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < groups * blocks; ++task) {
    const int64_t group = task / blocks;
    const int64_t first = (task % blocks) * kBlock;
    const int64_t width = std::min(kBlock, neurons - first);
    Block b;
    std::fill_n(b.sum1, width, 0.f);
    std::fill_n(b.sum2, width, 0.f);
    std::fill_n(b.lost1, width, 0.f);
    std::fill_n(b.lost2, width, 0.f);

    for (int64_t p = 0; p < rows_per_group; ++p) {
      const int64_t offset = (group * rows_per_group + p) * neurons + first;
      std::fill_n(b.row1, width, 0.f);
      std::fill_n(b.row2, width, 0.f);
      int64_t k = 0;
      for (; k + kUnroll <= steps; k += kUnroll)
        add_steps<Grad, kUnroll>(grad + k * step_stride + offset, step_stride, weights + k, b, width);
      for (; k < steps; ++k) add_steps<Grad, 1>(grad + k * step_stride + offset, step_stride, weights + k, b, width);
      if (act)
        for (int64_t f = 0; f < width; ++f) b.row1[f] *= widen(act[offset + f]);
      for (int64_t f = 0; f < width; ++f) compensated_add(b.sum1[f], b.lost1[f], b.row1[f]);
      for (int64_t f = 0; f < width; ++f) compensated_add(b.sum2[f], b.lost2[f], b.row2[f]);
    }
    std::copy_n(b.sum1, width, s1 + group * neurons + first);
    std::copy_n(b.sum2, width, s2 + group * neurons + first);
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
    with_type(act_dtype, act, [&](auto* a) {
      run(g, weights, a, s1, s2, steps, groups, rows_per_group, neurons);
    });
  });
}

}  // namespace mipfast
