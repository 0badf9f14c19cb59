// Bit casts and the exact conversions that everything else is built from.
//
// Rules of this folder: header-only, no torch, no libm, no allocation. Only operations whose result IEEE-754 fixes
// to the last bit are used on floats (+ - * / sqrt and integer conversion, round to nearest even), and the build
// turns contraction off, so that every compiler and device gives the same bits.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cstdint>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define AQN_HD __host__ __device__ __forceinline__
#else
#define AQN_HD inline __attribute__((always_inline))
#endif

namespace aqn {

#if defined(__CUDACC_RTC__)  // a compiler without a standard library
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#endif

AQN_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

AQN_HD float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  return __builtin_bit_cast(float, u);
#endif
}

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kAbsMask = 0x7fffffffu;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;
constexpr float kFloatMax = 3.4028234663852886e38f;

AQN_HD float abs_of(float x) { return float_of(bits_of(x) & kAbsMask); }
AQN_HD bool is_finite(float x) { return (bits_of(x) & kAbsMask) < kInfBits; }
AQN_HD bool is_nan(float x) { return (bits_of(x) & kAbsMask) > kInfBits; }
// Other bits, where all NaNs count as one: a payload means nothing, and devices differ in it.
AQN_HD bool differs(float a, float b) { return (bits_of(a) != bits_of(b)) & !(is_nan(a) & is_nan(b)); }
AQN_HD float with_sign_of(float magnitude, float x) { return float_of(bits_of(magnitude) | (bits_of(x) & kSignBit)); }

// 2^e for -127 <= e <= 127; 2^-127 is the fp32 subnormal that E8M0 can name.
AQN_HD float exp2_of(int e) { return float_of(e > -127 ? static_cast<uint32_t>(e + 127) << 23 : 0x00400000u); }

// bfloat16 is the upper half of fp32.
struct bf16 {
  uint16_t bits;
};

AQN_HD float load(float x) { return x; }
AQN_HD float load(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

AQN_HD void store(float* p, float x) { *p = x; }
AQN_HD void store(bf16* p, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);  // nearest, ties to even
  const uint32_t is_nan = (u & kAbsMask) > kInfBits ? 0xffffffffu : 0u;
  const uint32_t quiet = u | 0x00400000u;  // a NaN stays a NaN
  p->bits = static_cast<uint16_t>(((rounded & ~is_nan) | (quiet & is_nan)) >> 16);
}

// The nearest bfloat16, ties to even, as fp32.
AQN_HD float to_bf16(float x) {
  bf16 held;
  store(&held, x);
  return load(held);
}

}  // namespace aqn
