#pragma once

#include <cstdint>

namespace mipfast {

// out[r] = (sum_i words[r, i] whole[i], sum_i (words[r, i] >> 32) upper[i]) modulo 2^64
//
// words [rows, width], whole [width], upper [width], out [rows, 2], contiguous.
void word_sums(const int64_t* words, const int64_t* whole, const int64_t* upper, int64_t* out, int64_t rows,
               int64_t width);

}  // namespace mipfast
