#include "linear.h"

#ifdef MIPFAST_LINEAR

#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <new>

#include "clones.h"

#define MIPFAST_AVX512 __attribute__((target("avx512f")))

namespace mipfast {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kOneThread = 1 << 20;  // products; fewer are not worth waking a second thread for

// linear: rows of x side by side in vectors, times weights one by one. Those are read where they lie, each once.
constexpr int kOuter = kLeastOuter;  // 12 x 2 sums and 2 operands of 32 registers
constexpr int64_t kRows = 128;       // turned at a time: of 1536 inner they and the weights fit in 1 MiB

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// one block of up to 32 rows -> [inner, 16 or 32], zeros where there is no row
void turn(const float* x, int64_t stride, int64_t rows, int64_t inner, int64_t width, float* turned) {
  for (int64_t r = 0; r < width; ++r)
    for (int64_t k = 0; k < inner; ++k) turned[k * width + r] = r < rows ? x[r * stride + k] : 0.f;
}

template <int kVectors>
MIPFAST_AVX512 MIPFAST_INLINE void multiply(const float* turned, const float* weight, int64_t stride, int64_t inner,
                                            bool fetch, float* sums) {
  __m512 sum[kOuter][kVectors] = {};
  for (int64_t start = 0; start < inner; start += kLanes) {
    if (fetch)
      for (int n = 0; n < kOuter; ++n) MIPFAST_PREFETCH(weight + (kOuter + n) * stride + start);
    for (int64_t k = start; k < std::min(inner, start + kLanes); ++k) {
      __m512 x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = _mm512_load_ps(turned + (k * kVectors + v) * kLanes);
      for (int n = 0; n < kOuter; ++n) {
        const __m512 w = _mm512_set1_ps(weight[n * stride + k]);
        for (int v = 0; v < kVectors; ++v) sum[n][v] = _mm512_fmadd_ps(w, x[v], sum[n][v]);
      }
    }
  }
  for (int n = 0; n < kOuter; ++n)
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums + (n * kVectors + v) * kLanes, sum[n][v]);
}

// linear_input_gradient: weights side by side in vectors, a piece of their rows at a time, which lies together
constexpr int64_t kPiece = 64;
constexpr int kTall = 8;  // 8 x 3 sums and 3 operands of 32 registers
constexpr int kWide = 3;

// `last`: which columns of the last vector there are
template <int kVectors>
MIPFAST_AVX512 void add_products(const float* d_out, int64_t d_out_stride, const float* weight, int64_t weight_stride,
                                 int64_t outer, bool first, float* d_x, int64_t d_x_stride, int64_t rows,
                                 __mmask16 last) {
  constexpr __mmask16 kAll = 0xffff;
  for (int64_t r = 0; r < rows; r += kTall) {
    const float* from[kTall];
    float* to[kTall];
    for (int i = 0; i < kTall; ++i) {  // the last row takes the place of those that are not there
      from[i] = d_out + std::min(r + i, rows - 1) * d_out_stride;
      to[i] = d_x + std::min(r + i, rows - 1) * d_x_stride;
    }
    __m512 sum[kTall][kVectors];
    for (int i = 0; i < kTall; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 there = first ? 0 : v + 1 < kVectors ? kAll : last;
        sum[i][v] = _mm512_maskz_loadu_ps(there, to[i] + v * kLanes);
      }
    for (int64_t n = 0; n < outer; ++n) {
      __m512 w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const float* place = weight + n * weight_stride + v * kLanes;
        w[v] = _mm512_maskz_loadu_ps(v + 1 < kVectors ? kAll : last, place);
        if (r == 0) MIPFAST_PREFETCH(place + kPiece * weight_stride);
      }
      for (int i = 0; i < kTall; ++i) {
        const __m512 d = _mm512_set1_ps(from[i][n]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_fmadd_ps(d, w[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kTall; ++i)
      for (int v = 0; v < kVectors; ++v)
        _mm512_mask_storeu_ps(to[i] + v * kLanes, v + 1 < kVectors ? kAll : last, sum[i][v]);
  }
}

}  // namespace

MIPFAST_AVX512 void linear(const float* x, int64_t x_stride, const float* weight, int64_t weight_stride,
                           const float* bias, float* out, int64_t rows, int64_t inner, int64_t outer) {
  const int64_t room = std::min(kRows, (rows + kLanes - 1) / kLanes * kLanes) * inner;
  const std::unique_ptr<float, Free> memory(
      static_cast<float*>(::operator new(room * sizeof(float), std::align_val_t(64))));
  float* const turned = memory.get();
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t end = std::min(rows, start + kRows);
    for (int64_t r = start; r < end; r += 2 * kLanes)
      turn(x + r * x_stride, x_stride, std::min(2 * kLanes, end - r), inner, end - r > kLanes ? 2 * kLanes : kLanes,
           turned + (r - start) * inner);
#pragma omp parallel for schedule(static) if (rows * inner * outer > kOneThread)
    for (int64_t n = 0; n < outer; n += kOuter) {
      const int64_t first = std::min(n, outer - kOuter);  // the last tile may begin in the one before
      alignas(64) float sums[kOuter * 2 * kLanes];
      for (int64_t r = start; r < end; r += 2 * kLanes) {
        const bool two = end - r > kLanes;
        (two ? multiply<2> : multiply<1>)(turned + (r - start) * inner, weight + first * weight_stride, weight_stride,
                                          inner, r == start, sums);
        for (int64_t i = 0; i < std::min(2 * kLanes, end - r); ++i)
          for (int64_t j = n - first; j < kOuter; ++j)
            out[(r + i) * outer + first + j] = sums[j * (two ? 2 : 1) * kLanes + i] + (bias ? bias[first + j] : 0.f);
      }
    }
  }
}

MIPFAST_AVX512 void linear_input_gradient(const float* d_out, int64_t d_out_stride, const float* weight,
                                          int64_t weight_stride, float* d_x, int64_t rows, int64_t inner,
                                          int64_t outer) {
  constexpr int64_t kColumns = kWide * kLanes;
  constexpr int64_t kChunk = 4 * kColumns;  // columns of one thread
#pragma omp parallel for schedule(static) if (rows * inner * outer > kOneThread)
  for (int64_t chunk = 0; chunk < inner; chunk += kChunk) {
    const int64_t end = std::min(inner, chunk + kChunk);
    for (int64_t start = 0; start < rows; start += kRows) {
      for (int64_t n = 0; n < outer; n += kPiece) {
        for (int64_t k = chunk; k < end; k += kColumns) {
          const int64_t width = std::min(kColumns, end - k);
          const int64_t vectors = (width + kLanes - 1) / kLanes;
          const auto last = static_cast<__mmask16>(0xffff >> (vectors * kLanes - width));
          const auto add = vectors == 3 ? add_products<3> : vectors == 2 ? add_products<2> : add_products<1>;
          add(d_out + start * d_out_stride + n, d_out_stride, weight + n * weight_stride + k, weight_stride,
              std::min(kPiece, outer - n), n == 0, d_x + start * inner + k, inner, std::min(kRows, rows - start), last);
        }
      }
    }
  }
}

}  // namespace mipfast
#endif
