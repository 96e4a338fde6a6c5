// See cuda_runtime.h.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16, exponent = (half.bits >> 10) & 31u;
  const uint32_t mantissa = half.bits & 1023u;
  if (exponent == 0) {  // zero and what is too small for an exponent
    const float size = static_cast<float>(mantissa) / 16777216.0f;
    return sign != 0 ? -size : size;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
