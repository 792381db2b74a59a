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

MIPFAST_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// products summed on their own before they are added to the total: as exact as MKL's, which one running sum is not
constexpr int64_t kPiece = 64;

// linear: rows of x side by side in vectors, times weights one by one, which are read where they lie.
constexpr int kOuter = kLeastOuter;  // 12 x 2 sums and 2 operands of 32 registers
constexpr int64_t kRows = 64;        // at a time: of 1536 inner they fit in half of a second-level cache of 1 MiB
static_assert(kRows % (2 * kLanes) == 0, "blocks of rows are written one after the other");

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

MIPFAST_AVX512 MIPFAST_INLINE void transpose_16x16(__m512 (&a)[16]) {
  __m512 b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // then lane l of a[i + j] is column 4 l + j of rows i to i + 3
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
    a[4 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88);
    a[8 + j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
    a[12 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

// rows of x -> [inner, width], zeros where there is no row
MIPFAST_AVX512 void transpose_rows(const float* x, int64_t stride, int64_t rows, int64_t inner, int64_t width,
                                   float* transposed) {
  for (int64_t r = 0; r < width; r += kLanes)
    for (int64_t k = 0; k < inner; k += kLanes) {
      __m512 block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = r + i < rows ? _mm512_maskz_loadu_ps(first_lanes(inner - k), x + (r + i) * stride + k) : __m512{};
      transpose_16x16(block);
      for (int64_t i = 0; i < std::min(kLanes, inner - k); ++i)
        _mm512_store_ps(transposed + (k + i) * width + r, block[i]);
    }
}

template <int kVectors>
MIPFAST_AVX512 MIPFAST_INLINE void multiply(const float* transposed, const float* weight, int64_t stride, int64_t inner,
                                            bool fetch, __m512 (&sum)[kOuter][kVectors]) {
  for (int n = 0; n < kOuter; ++n)
    for (int v = 0; v < kVectors; ++v) sum[n][v] = __m512{};
  for (int64_t start = 0; start < inner; start += kLanes) {
    if (fetch)
      for (int n = 0; n < kOuter; ++n) MIPFAST_PREFETCH(weight + (kOuter + n) * stride + start);
    for (int64_t k = start; k < std::min(inner, start + kLanes); ++k) {
      __m512 x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = _mm512_load_ps(transposed + (k * kVectors + v) * kLanes);
      for (int n = 0; n < kOuter; ++n) {
        const __m512 w = _mm512_set1_ps(weight[n * stride + k]);
        for (int v = 0; v < kVectors; ++v) sum[n][v] = _mm512_fmadd_ps(w, x[v], sum[n][v]);
      }
    }
  }
}

// one tile of the result: kOuter columns of up to 16 kVectors rows, but for the first `done` columns
template <int kVectors>
MIPFAST_AVX512 void tile(const float* transposed, const float* weight, int64_t stride, int64_t inner, bool fetch,
                         const float* bias, float* out, int64_t outer, int64_t rows, int64_t done) {
  __m512 total[kOuter][kVectors] = {};
  for (int64_t k = 0; k < inner; k += kPiece) {
    __m512 sum[kOuter][kVectors];
    multiply<kVectors>(transposed + k * kVectors * kLanes, weight + k, stride, std::min(kPiece, inner - k), fetch, sum);
    for (int n = 0; n < kOuter; ++n)
      for (int v = 0; v < kVectors; ++v) total[n][v] += sum[n][v];
  }
  const auto written = static_cast<__mmask16>(first_lanes(kOuter) & ~first_lanes(done));
  const __m512 shift = bias ? _mm512_maskz_loadu_ps(written, bias) : __m512{};
  for (int v = 0; v < kVectors; ++v) {
    __m512 block[16] = {};
    for (int n = 0; n < kOuter; ++n) block[n] = total[n][v];
    transpose_16x16(block);
    for (int64_t i = 0; i < std::min(kLanes, rows - v * kLanes); ++i)
      _mm512_mask_storeu_ps(out + (v * kLanes + i) * outer, written, _mm512_add_ps(block[i], shift));
  }
}

// linear_input_gradient: weights side by side in vectors, kPiece of their rows at a time: neighbours in memory
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
    for (int i = 0; i < kTall; ++i) {  // where fewer rows are left, the last fills the block
      from[i] = d_out + std::min(r + i, rows - 1) * d_out_stride;
      to[i] = d_x + std::min(r + i, rows - 1) * d_x_stride;
    }
    __m512 sum[kTall][kVectors];
    for (int i = 0; i < kTall; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] = __m512{};
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
    if (!first)  // all are read before one is written, as the last row may be there twice
      for (int i = 0; i < kTall; ++i)
        for (int v = 0; v < kVectors; ++v)
          sum[i][v] += _mm512_maskz_loadu_ps(v + 1 < kVectors ? kAll : last, to[i] + v * kLanes);
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
  float* const transposed = memory.get();
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t end = std::min(rows, start + kRows);
    for (int64_t r = start; r < end; r += 2 * kLanes)
      transpose_rows(x + r * x_stride, x_stride, std::min(2 * kLanes, end - r), inner,
                     end - r > kLanes ? 2 * kLanes : kLanes, transposed + (r - start) * inner);
#pragma omp parallel for schedule(static) if (rows * inner * outer > kOneThread)
    for (int64_t n = 0; n < outer; n += kOuter) {
      const int64_t first = std::min(n, outer - kOuter);  // the last tile may begin in the one before
      for (int64_t r = start; r < end; r += 2 * kLanes)
        (end - r > kLanes ? tile<2> : tile<1>)(transposed + (r - start) * inner, weight + first * weight_stride,
                                               weight_stride, inner, r == start, bias ? bias + first : nullptr,
                                               out + r * outer + first, outer, end - r, n - first);
    }
  }
}

MIPFAST_AVX512 void linear_input_gradient(const float* d_out, int64_t d_out_stride, const float* weight,
                                          int64_t weight_stride, float* d_x, int64_t rows, int64_t inner,
                                          int64_t outer) {
  constexpr int64_t kColumns = 4 * kWide * kLanes;  // a block of columns is one thread's
#pragma omp parallel for schedule(static) if (rows * inner * outer > kOneThread)
  for (int64_t block = 0; block < inner; block += kColumns) {
    const int64_t end = std::min(inner, block + kColumns);
    for (int64_t start = 0; start < rows; start += kRows) {
      for (int64_t n = 0; n < outer; n += kPiece) {
        int64_t vectors;
        for (int64_t k = block; k < end; k += vectors * kLanes) {
          const int64_t left = (end - k + kLanes - 1) / kLanes;
          vectors = left == 4 ? 2 : std::min<int64_t>(left, kWide);  // 8 sums alone do not hide an fma's latency
          const auto add = vectors == 3 ? add_products<3> : vectors == 2 ? add_products<2> : add_products<1>;
          add(d_out + start * d_out_stride + n, d_out_stride, weight + n * weight_stride + k, weight_stride,
              std::min(kPiece, outer - n), n == 0, d_x + start * inner + k, inner, std::min(kRows, rows - start),
              first_lanes(end - k - (vectors - 1) * kLanes));
        }
      }
    }
  }
}

}  // namespace mipfast
#endif
