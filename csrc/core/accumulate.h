// How a matrix unit adds up products: operands as significands and exponents, summands cut to a common unit, results.
// docs/semantics.md has the formulas.
#pragma once

#include "bits.h"

namespace aqn {

enum class Order : int { kFused = 0, kProductsFirst = 1, kEvenOdd = 2, kPairwise = 3 };

struct Accumulator {
  int fraction_bits, chunk;
  Order order;
  bool nearest;  // summands are cut to nearest even, not toward zero
  int result_bits;
  bool nearest_result;
  bool flush;  // operands below 2^min_exponent and results below 2^-126 are 0
  int min_exponent;
  int64_t promote;
};

constexpr int kNoExponent = -4096;     // of zero, which takes part in no maximum
constexpr int kLowestExponent = -300;  // below that of every product
constexpr int kFineBits = 7;           // a products' sum is aligned with the running sum so many bits finer than this

AQN_HD double double_of(uint64_t u) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(u));
#else
  return __builtin_bit_cast(double, u);
#endif
}

AQN_HD uint64_t bits_of(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  return __builtin_bit_cast(uint64_t, x);
#endif
}

AQN_HD double double_exp2_of(int e) { return double_of(static_cast<uint64_t>(e + 1023) << 52); }  // |e| <= 1022
AQN_HD int exponent_of(double x) { return static_cast<int>((bits_of(x) >> 52) & 0x7ff) - 1023; }  // of a normal number
AQN_HD int larger(int a, int b) { return a > b ? a : b; }

// An operand x = significand * 2^exponent, 1 <= |significand| < 2, and the exponent by which the unit aligns it.
struct Operand {
  float significand;
  int exponent, aligned;
};

// Infinities and NaNs become 0 here; they are added apart.
AQN_HD Operand operand_of(float x, const Accumulator& k) {
  const uint32_t u = bits_of(x) & kAbsMask;
  const bool small = u < 0x00800000u;
  const uint32_t v = bits_of(small ? x * 16777216.0f : x);
  const int exponent = static_cast<int>((v >> 23) & 0xffu) - (small ? 127 + 24 : 127);
  const bool none = u == 0 || u >= kInfBits || (k.flush && exponent < k.min_exponent);
  const float significand = float_of((v & 0x807fffffu) | 0x3f800000u);
  return {none ? 0.0f : significand, none ? kNoExponent : exponent,
          none ? kNoExponent : larger(exponent, k.min_exponent)};
}

// The exponent of a finite running sum, of at least -126; that of zero is none.
AQN_HD int running_exponent(float x) {
  const int field = static_cast<int>((bits_of(x) >> 23) & 0xffu);
  return (bits_of(x) & kAbsMask) == 0 ? kNoExponent : larger(field, 1) - 127;
}

// x as an integer, toward zero or to nearest even; |x| must fit.
template <class Int, bool Nearest, class Float>
AQN_HD Int cut(Float x) {
  const Int whole = static_cast<Int>(x);
  if (!Nearest) return whole;
  const Float rest = x - static_cast<Float>(whole), away = rest < 0 ? -rest : rest;
  const bool up = away > Float(0.5) || (away == Float(0.5) && (whole & 1));
  return whole + (up ? (rest < 0 ? -1 : 1) : 0);
}

// The multiple of a power of two that is nearest to x, ties to even, for |x| < 2^51 quantum.
AQN_HD double to_nearest(double x, double quantum) {
  const double shift = 6755399441055744.0 * quantum;  // 1.5 * 2^52
  return (x + shift) - shift;
}

AQN_HD double round_down(double x) {  // |x| < 2^51
  const double near = to_nearest(x, 1.0);
  return near > x ? near - 1.0 : near;
}

AQN_HD double magnitude_of(double x) { return double_of(bits_of(x) & 0x7fffffffffffffffu); }

// Without a branch, which would keep a loop from being vectorised.
AQN_HD double kept(double x, bool dropped) { return double_of(bits_of(x) & (static_cast<uint64_t>(dropped) - 1)); }

// A chunk's result as the unit's fp32: result_bits fraction bits, subnormals, infinite beyond the range.
AQN_HD float result_of(double x, const Accumulator& k) {
  const double quantum = double_exp2_of(larger(exponent_of(x), -126) - k.result_bits);
  const double near = to_nearest(x, quantum);
  const bool beyond = magnitude_of(near) > magnitude_of(x);
  const double step = double_of(bits_of(quantum) | (bits_of(x) & 0x8000000000000000u));
  const float y = static_cast<float>(near - kept(step, k.nearest_result || !beyond));
  return abs_of(y) < (k.flush ? 1.17549435e-38f : 0.0f) ? 0.0f : y + 0.0f;
}

// The products' sum, in units of 2^(largest - fraction_bits), and the running sum under the larger exponent.
AQN_HD double with_running(double total, int largest, float running, const Accumulator& k) {
  const int own = running_exponent(running);
  const int common = larger(larger(largest, own), -126);
  const double products = round_down(total * double_exp2_of(largest - common + kFineBits));
  const double before = round_down(static_cast<double>(running) * double_exp2_of(k.fraction_bits - common));
  // even-odd: far below, a negative sum is dropped, not rounded down to the last unit
  const bool far = own < common - (k.order == Order::kEvenOdd ? 25 : -2 * kNoExponent);
  const double sum = products + kept(before, far) * double_exp2_of(kFineBits);
  return sum * double_exp2_of(common - k.fraction_bits - kFineBits);
}

}  // namespace aqn
