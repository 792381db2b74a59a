#pragma once

#include "dtypes.h"

namespace mipfast {

// loss = mean over the rows that count of ||hidden[r] - target[r]||^2 / width; 0 where none does
// gradient[r] = d_loss * d loss / d hidden[r]; 0 in the other rows
//
// hidden, gradient [rows, width] of hidden_dtype, contiguous; gradient is written
// target           [width] if one_target, else [rows, width]; of hidden_dtype or float32, contiguous
// kept             [rows], not zero where a row counts, or null (= all); other rows of hidden are not read
//
// Neither result depends on the number of threads.
double misdirection_loss(const void* hidden, Dtype hidden_dtype, const void* target, Dtype target_dtype,
                         bool one_target, const uint8_t* kept, int64_t rows, int64_t width);

void misdirection_gradient(const void* hidden, Dtype hidden_dtype, const void* target, Dtype target_dtype,
                           bool one_target, const uint8_t* kept, double d_loss, void* gradient, int64_t rows,
                           int64_t width);

}  // namespace mipfast
