#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace mipfast {

// Fewer elements are not worth waking a second thread for.
constexpr int64_t kOneThread = 32768;

enum class Dtype { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// then(data), data of the type that dtype names
template <typename Then>
void with_type(Dtype dtype, const void* data, Then then) {
  switch (dtype) {
    case Dtype::float32: return then(static_cast<const float*>(data));
    case Dtype::bfloat16: return then(static_cast<const BFloat16*>(data));
    case Dtype::float16: return then(static_cast<const Float16*>(data));
  }
}

MIPFAST_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MIPFAST_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// All conversions are branch free, so that loops over them vectorise.
MIPFAST_INLINE float widen(float x) { return x; }

MIPFAST_INLINE float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

// Exponent bias 15 -> 127 by a multiplication, exact for subnormals.
MIPFAST_INLINE float widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // exponent 31: infinity or NaN
  return from_bits(bits | ((x.bits & 0x8000u) << 16));
}

// To the nearest value, ties to even, as torch rounds.
MIPFAST_INLINE void narrow(float x, float* out) { *out = x; }

MIPFAST_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MIPFAST_INLINE void narrow(float x, Float16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // exponent bias 127 -> 15
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to 2^-24
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x47800000u) result = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace mipfast
