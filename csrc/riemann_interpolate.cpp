#include "riemann_interpolate.h"

#include <algorithm>
#include <type_traits>

namespace mipfast {
namespace {

constexpr int64_t kPiece = 16384;

template <typename Act>
MIPFAST_CLONES void scale_row(const Act* act, float alpha, Act* __restrict out, int64_t neurons) {
  for (int64_t f = 0; f < neurons; ++f) narrow(alpha * widen(act[f]), &out[f]);
}

}  // namespace

void riemann_interpolate(const void* act, Dtype dtype, const float* alphas, const int64_t* names, void* out,
                         int64_t steps, int64_t rows, int64_t neurons, int64_t names_per_row) {
  with_type(dtype, act, [&](auto* rows_in) {
    auto* rows_out = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(rows_in)>>*>(out);
    const int64_t total = rows * neurons;
    if (names) {
      // step by step: several rows written at once, a multiple of 4 KiB apart, get in each other's way
#pragma omp parallel for collapse(2) schedule(static) if (total > kOneThread)
      for (int64_t k = 0; k < steps; ++k) {
        for (int64_t r = 0; r < rows; ++r) {
          const auto* from = rows_in + r * neurons;
          auto* to = rows_out + k * total + r * neurons;
          std::memcpy(to, from, neurons * sizeof *to);
          for (int64_t i = 0; i < names_per_row; ++i) {
            const int64_t f = names[r * names_per_row + i];
            if (f >= 0) narrow(alphas[k] * widen(from[f]), &to[f]);
          }
        }
      }
      return;
    }
    // a piece of all rows, step after step: it is read from memory once
#pragma omp parallel for schedule(static) if (total > kOneThread)
    for (int64_t first = 0; first < total; first += kPiece) {
      for (int64_t k = 0; k < steps; ++k)
        scale_row(rows_in + first, alphas[k], rows_out + k * total + first, std::min(kPiece, total - first));
    }
  });
}

}  // namespace mipfast
