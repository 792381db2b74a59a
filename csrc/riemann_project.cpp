#include "riemann_project.h"

#include <algorithm>
#include <type_traits>

namespace mipfast {
namespace {

// Rows of weight that stay in a core's cache while every row of act looks its neurons up in them.
constexpr int64_t kPiece = 16;

template <typename Value>
MIPFAST_CLONES void combine(const Value* base, const float* share, float factor, Value* __restrict out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) narrow(widen(base[i]) + factor * share[i], &out[i]);
}

}  // namespace

void riemann_project(const void* base, const void* act, const void* weight, Dtype dtype, const float* alphas,
                     const int64_t* names, void* out, int64_t steps, int64_t rows, int64_t hidden, int64_t neurons,
                     int64_t names_per_row) {
  with_type(dtype, act, [&](auto* values) {
    using Value = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    const auto* products = static_cast<const Value*>(base);
    const auto* columns = static_cast<const Value*>(weight);
#pragma omp parallel for schedule(static) if (rows * hidden > kOneThread)
    for (int64_t first = 0; first < hidden; first += kPiece) {
      const int64_t width = std::min(kPiece, hidden - first);
      for (int64_t r = 0; r < rows; ++r) {
        float share[kPiece] = {};
        for (int64_t i = 0; i < names_per_row; ++i) {
          const int64_t f = names[r * names_per_row + i];
          if (f < 0) continue;
          const float value = widen(values[r * neurons + f]);
          for (int64_t h = 0; h < width; ++h) share[h] += value * widen(columns[(first + h) * neurons + f]);
        }
        const int64_t place = r * hidden + first;
        for (int64_t k = 0; k < steps; ++k)
          combine(products + place, share, alphas[k] - 1.f, static_cast<Value*>(out) + k * rows * hidden + place, width);
      }
    }
  });
}

}  // namespace mipfast
