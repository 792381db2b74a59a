#pragma once

#include <cstdint>

// The vectors of csrc/linear.cpp are an extension of GCC and Clang, and 512 bits wide.
#if defined(__GNUC__) && defined(__x86_64__)
#define MIPFAST_LINEAR

namespace mipfast {

// out = x Wᵀ + bias, for few rows of x against weights that no cache holds.
//
// x [rows, inner] of stride x_stride, weight [outer, inner] of stride weight_stride, bias [outer] or null,
// out [rows, outer] contiguous; all float32, the elements of a row adjacent, outer at least kLeastOuter. Needs AVX-512.
// An element's products are summed in pieces of neighbours: neither other rows nor the number of threads change it.
constexpr int64_t kLeastOuter = 12;
void linear(const float* x, int64_t x_stride, const float* weight, int64_t weight_stride, const float* bias, float* out,
            int64_t rows, int64_t inner, int64_t outer);

// d_x = d_out W, of any sizes from 1: d_out [rows, outer] of stride d_out_stride, d_x [rows, inner] contiguous.
void linear_input_gradient(const float* d_out, int64_t d_out_stride, const float* weight, int64_t weight_stride,
                           float* d_x, int64_t rows, int64_t inner, int64_t outer);

}  // namespace mipfast
#endif
