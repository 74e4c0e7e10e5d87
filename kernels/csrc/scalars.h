// A few instructions on one number, for loops that are compiled for several instruction sets (isa.h).

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

INLINE float to_float(float x) { return x; }
INLINE float to_float(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE void from_float(float x, float& out) { out = x; }
INLINE void from_float(float x, uint16_t& bf16) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bf16 = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

// The bits of a float as an integer that compares like it. Clang does not vectorise a maximum of floats without
// -ffast-math.
INLINE int32_t ordered(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE float from_ordered(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
