#include "word_sums.h"

#include "clones.h"
#include "dtypes.h"

namespace mipfast {
namespace {

MIPFAST_CLONES void one_row(const int64_t* __restrict words, const int64_t* __restrict whole,
                            const int64_t* __restrict upper, int64_t* __restrict out, int64_t width) {
  uint64_t a = 0, b = 0;  // unsigned: it may overflow
  for (int64_t i = 0; i < width; ++i) {
    a += static_cast<uint64_t>(words[i]) * static_cast<uint64_t>(whole[i]);
    b += static_cast<uint64_t>(words[i] >> 32) * static_cast<uint64_t>(upper[i]);
  }
  out[0] = static_cast<int64_t>(a);
  out[1] = static_cast<int64_t>(b);
}

}  // namespace

void word_sums(const int64_t* words, const int64_t* whole, const int64_t* upper, int64_t* out, int64_t rows,
               int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > kOneThread)
  for (int64_t r = 0; r < rows; ++r) one_row(words + r * width, whole, upper, out + 2 * r, width);
}

}  // namespace mipfast
