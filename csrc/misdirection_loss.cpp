#include "misdirection_loss.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

namespace mipfast {
namespace {

constexpr int64_t kLanes = 64;

template <typename Hidden, typename Target>
MIPFAST_CLONES double squared_distance(const Hidden* hidden, const Target* target, int64_t width) {
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float difference = widen(hidden[d + i]) - widen(target[d + i]);
      lanes[i] += difference * difference;
    }
  }
  double sum = 0.;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  for (; d < width; ++d) {
    const float difference = widen(hidden[d]) - widen(target[d]);
    sum += difference * difference;
  }
  return sum;
}

template <typename Hidden, typename Target>
MIPFAST_CLONES void scaled_difference(const Hidden* hidden, const Target* target, float scale,
                                      Hidden* __restrict out, int64_t width) {
  for (int64_t d = 0; d < width; ++d) narrow((widen(hidden[d]) - widen(target[d])) * scale, &out[d]);
}

int64_t terms(const uint8_t* kept, int64_t rows, int64_t width) {
  const int64_t dropped = kept ? std::count(kept, kept + rows, 0) : 0;
  return std::max<int64_t>(rows - dropped, 1) * width;
}

// then(hidden, target) of their types
template <typename Then>
void with_types(const void* hidden, Dtype hidden_dtype, const void* target, Dtype target_dtype, Then then) {
  with_type(hidden_dtype, hidden, [&](auto* h) {
    if (target_dtype == Dtype::float32) return then(h, static_cast<const float*>(target));
    then(h, static_cast<decltype(h)>(target));
  });
}

}  // namespace

double misdirection_loss(const void* hidden, Dtype hidden_dtype, const void* target, Dtype target_dtype,
                         bool one_target, const uint8_t* kept, int64_t rows, int64_t width) {
  std::vector<double> sums(rows);
  with_types(hidden, hidden_dtype, target, target_dtype, [&](auto* h, auto* t) {
#pragma omp parallel for schedule(static) if (rows * width > kOneThread)
    for (int64_t r = 0; r < rows; ++r)
      sums[r] = kept && !kept[r] ? 0. : squared_distance(h + r * width, one_target ? t : t + r * width, width);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.) / static_cast<double>(terms(kept, rows, width));
}

void misdirection_gradient(const void* hidden, Dtype hidden_dtype, const void* target, Dtype target_dtype,
                           bool one_target, const uint8_t* kept, double d_loss, void* gradient, int64_t rows,
                           int64_t width) {
  const auto scale = static_cast<float>(2. * d_loss / static_cast<double>(terms(kept, rows, width)));
  with_types(hidden, hidden_dtype, target, target_dtype, [&](auto* h, auto* t) {
    auto* out = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(h)>>*>(gradient);
#pragma omp parallel for schedule(static) if (rows * width > kOneThread)
    for (int64_t r = 0; r < rows; ++r) {
      if (kept && !kept[r]) std::fill_n(reinterpret_cast<char*>(out + r * width), width * sizeof *out, 0);
      else scaled_difference(h + r * width, one_target ? t : t + r * width, scale, out + r * width, width);
    }
  });
}

}  // namespace mipfast
