#pragma once

#include <cstdint>
#include <cstring>

namespace mipfast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

// Exponent bias 15 -> 127 by a multiplication: branch free, so it vectorises, and exact for subnormals.
inline float widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  float value = from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // exponent 31: infinity or NaN
  return from_bits(bits | ((x.bits & 0x8000u) << 16));
}

}  // namespace mipfast
