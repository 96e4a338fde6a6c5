#include "leaves.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define MHEX_X86 1
#endif

namespace mhex::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename Acc>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float largest = __FLT_MAX__;
};
template <>
struct Limits<double> {
  static constexpr double largest = __DBL_MAX__;
};

// The integer as wide as a lane, for shuffles.
template <int Bytes>
struct LaneIndex;
template <>
struct LaneIndex<4> {
  typedef int32_t type;
};
template <>
struct LaneIndex<8> {
  typedef int64_t type;
};

[[maybe_unused]] float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float size = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t word = sign | (mantissa << 13) | (exponent == 0x1f ? 0x7f800000u : (exponent + 112u) << 23);
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

namespace baseline {
#define MHEX_VECTOR_BYTES 16
#define MHEX_SET_NAME "baseline"
#include "leaves.inl"
#undef MHEX_VECTOR_BYTES
#undef MHEX_SET_NAME
}  // namespace baseline

#ifdef MHEX_X86

#define MHEX_HAS_F16C 1

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define MHEX_VECTOR_BYTES 32
#define MHEX_SET_NAME "avx2"
#include "leaves.inl"
#undef MHEX_VECTOR_BYTES
#undef MHEX_SET_NAME
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace avx512 {
#define MHEX_VECTOR_BYTES 64
#define MHEX_SET_NAME "avx512"
#include "leaves.inl"
#undef MHEX_VECTOR_BYTES
#undef MHEX_SET_NAME
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // MHEX_X86

const InstructionSet& choose() {
  const char* wish = std::getenv("MHEX_CPU");
  const auto allowed = [wish](const char* name) { return wish == nullptr || std::strcmp(wish, name) == 0; };
  (void)allowed;
#ifdef MHEX_X86
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::set;
  }
  const bool not_baseline = wish == nullptr || std::strcmp(wish, "baseline") != 0;
  if (not_baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return avx2::set;
  }
#endif
  return baseline::set;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace mhex::cpu
