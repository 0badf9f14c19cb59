// Rounding to an element format whose parameters are data: one function for every format and rounding.
#pragma once

#include "bits.h"

namespace aqn {

enum class Overflow : int { kSaturate = 0, kInf = 1, kNan = 2 };

enum class Rounding : int {
  kNearestEven = 0,
  kNearestAway = 1,
  kNearestDown = 2,  // ties towards zero
  kTowardZero = 3,
  kUp = 4,
  kDown = 5,
  kStochastic = 6,
  kHif8Hybrid = 7,
};

// What a rounding needs to know of a format (aqnsim/formats.py derives these from its dataclass).
struct Element {
  int mantissa_bits;       // explicit fraction bits, 0..22
  int min_exponent;        // numbers below 2^min_exponent are spaced as those above are
  int bias;                // exponent plus bias is the code where there are no fraction bits: it may be even or odd
  float max;               // largest finite magnitude
  float max_negative;      // the same of negative numbers
  float min_normal;        // smallest number with a leading 1
  float nan;               // what a NaN becomes
  Overflow overflow;       // what happens beyond the range
  Rounding rounding;       //
  int random_bits;         // of a stochastic rounding, 1..32
  bool is_signed;          // else negative values become NaN
  bool has_zero;           // else min_normal stands for everything below it
  bool has_negative_zero;  // else a zero has no sign
  bool flush;              // results below min_normal become 0
  bool tapered;            // HiFloat8: the fraction's width depends on the exponent

  // Whether Rounder below gives the same: IEEE-like, nearest even, all of fp32's zeros and NaNs kept.
  AQN_HD bool is_plain() const {
    return rounding == Rounding::kNearestEven && is_signed && has_zero && has_negative_zero && !flush && !tapered &&
           max == max_negative && is_nan(nan) && (mantissa_bits > 0 || (bias & 1));
  }
};

// The constants of a plain element's rounding: made once a call.
struct Rounder {
  uint32_t half_minus_one, keep_mask, shift;
  float min_normal, subnormal_magic, max, above;

  AQN_HD explicit Rounder(const Element& f)
      : half_minus_one((1u << (22 - f.mantissa_bits)) - 1u),
        keep_mask(~((1u << (23 - f.mantissa_bits)) - 1u)),
        shift(static_cast<uint32_t>(23 - f.mantissa_bits)),
        min_normal(exp2_of(f.min_exponent)),
        // Adding this constant pushes the bits below the subnormal quantum out of fp32's fraction: the addition itself
        // rounds to nearest even.
        subnormal_magic(exp2_of(f.min_exponent - f.mantissa_bits + 23)),
        max(f.max),
        above(f.overflow == Overflow::kSaturate ? f.max
                                                : float_of(f.overflow == Overflow::kInf ? kInfBits : kNanBits)) {}

  // Nearest, ties to even. NaN stays NaN; the sign of zero is kept.
  AQN_HD float operator()(float x) const {
    const uint32_t magnitude = bits_of(x) & kAbsMask;
    const uint32_t odd = (magnitude >> shift) & 1u;
    const float normal = float_of((magnitude + half_minus_one + odd) & keep_mask);
    const float subnormal = (float_of(magnitude) + subnormal_magic) - subnormal_magic;
    float r = float_of(magnitude) < min_normal ? subnormal : normal;
    r = r > max ? above : r;
    r = magnitude > kInfBits ? float_of(magnitude) : r;
    return with_sign_of(r, x);
  }
};

// HiFloat8 (arXiv 2409.16626): fraction bits of numbers with this exponent.
AQN_HD int hif8_fraction_bits(int exponent) {
  const int a = exponent < 0 ? -exponent : exponent;
  return 3 - (a > 3 ? 1 : 0) - (a > 7 ? 1 : 0) - (a > 15 ? 1 : 0);
}

// What follows runs in lanes: truths are 0 or 1, combined by & and |, and choices are between values, never branches.
AQN_HD uint32_t truth(bool b) { return b ? 1u : 0u; }

// The constants of any element's rounding, as numbers and masks: made once a call.
struct Grid {
  int mantissa_bits, min_exponent, bias, tapered_mask;
  uint32_t random_mask, is_signed, zero_sign;
  float max, max_negative, above, above_negative;  // the range, and what lies beyond it
  float low, low_result;                           // magnitudes below `low` become `low_result`
  float nan;

  AQN_HD explicit Grid(const Element& f)
      : mantissa_bits(f.mantissa_bits),
        min_exponent(f.min_exponent),
        bias(f.bias),
        tapered_mask(f.tapered ? -1 : 0),
        random_mask(~0u << ((32 - f.random_bits) & 31)),
        is_signed(truth(f.is_signed)),
        zero_sign(truth(f.has_negative_zero)),
        max(f.max),
        max_negative(f.max_negative),
        low(f.has_zero && !f.flush ? 0.0f : f.min_normal),
        low_result(f.has_zero ? 0.0f : f.min_normal),
        nan(f.nan) {
    const float beyond = float_of(f.overflow == Overflow::kInf ? kInfBits : kNanBits);
    above = f.overflow == Overflow::kSaturate ? f.max : beyond;
    above_negative = f.overflow == Overflow::kSaturate ? f.max_negative : beyond;
  }
};

// A finite magnitude on its way to the grid: significand * 2^(exponent - 23), of which `dropped` low bits go.
struct Dropped {
  uint32_t significand, whole, rest, half, odd;
  int exponent, quantum, dropped, shift;

  AQN_HD Dropped(const Grid& f, uint32_t magnitude) {
    const bool tiny = magnitude < 0x00800000u;  // an fp32 subnormal, or zero
    const uint32_t u = bits_of(float_of(magnitude) * (tiny ? 0x1p24f : 1.0f));
    exponent = static_cast<int>(u >> 23) - (tiny ? 127 + 24 : 127);
    significand = magnitude == 0 ? 0u : (u & 0x007fffffu) | 0x00800000u;
    const int width = (hif8_fraction_bits(exponent) & f.tapered_mask) | (f.mantissa_bits & ~f.tapered_mask);
    quantum = (exponent > f.min_exponent ? exponent : f.min_exponent) - width;
    dropped = 23 + quantum - exponent;
    shift = dropped < 31 ? dropped : 31;
    whole = significand >> shift;
    rest = significand & ((1u << shift) - 1u);
    half = 1u << (shift - 1);
    const uint32_t odd_exponent = truth(whole == 1u) & static_cast<uint32_t>(quantum + f.bias);
    odd = (width == 0 ? odd_exponent : whole) & 1u;
  }

  AQN_HD float value(uint32_t steps) const {  // exact: steps has at most 23 bits
    const uint32_t normal = static_cast<uint32_t>(quantum + 127) << 23;
    const uint32_t subnormal = 1u << (static_cast<uint32_t>(quantum + 149) & 31u);
    return static_cast<float>(static_cast<int32_t>(steps)) * float_of(quantum >= -126 ? normal : subnormal);
  }
};

// The top 32 bits of the share of a step that is dropped.
AQN_HD uint32_t dropped_share(const Dropped& d) {
  const int down = d.dropped - 32;
  const uint32_t high = d.rest << ((32 - d.dropped) & 31), low = d.significand >> (down & 31);
  const uint32_t tail = down < 32 ? low : 0u;
  return down < 0 ? high : tail;
}

template <Rounding R>
AQN_HD uint32_t rounds_up(const Grid& f, const Dropped& d, uint32_t negative, uint32_t magnitude, uint32_t word) {
  const uint32_t above = truth(d.rest > d.half), tie = truth(d.rest == d.half), inexact = truth(d.rest != 0);
  if constexpr (R == Rounding::kNearestEven) return above | (tie & d.odd);
  if constexpr (R == Rounding::kNearestAway) return above | tie;
  if constexpr (R == Rounding::kNearestDown) return above;
  if constexpr (R == Rounding::kUp) return inexact & (negative ^ 1u);
  if constexpr (R == Rounding::kDown) return inexact & negative;
  if constexpr (R == Rounding::kStochastic) {  // up where share + word carries out of the random bits
    const uint32_t share = dropped_share(d) & f.random_mask;
    return truth(share + (word & f.random_mask) < share);
  }
  if constexpr (R == Rounding::kHif8Hybrid) {  // the 14 leading discarded bits against the 14 trailing ones
    const uint32_t leading = d.rest >> ((d.shift - 14) & 31), trailing = d.rest & 0x3fffu;
    const uint32_t pseudo = truth(leading >= trailing) & inexact & truth(d.exponent >= -23);  // an exact value stays
    const uint32_t near = truth(d.exponent > -4) & truth(d.exponent < 4);
    return near | truth(magnitude >= 0x47200000u) ? above | tie : pseudo;  // 40960
  }
  return 0u;  // towards zero
}

// x as a number of the format; see round_to() of aqnsim/reference/rounding.py.
template <Rounding R>
AQN_HD float rounded(const Grid& f, float x, uint32_t word) {
  const uint32_t magnitude = bits_of(x) & kAbsMask, negative = bits_of(x) >> 31;
  const Dropped d(f, magnitude);
  float r = d.value(d.whole + rounds_up<R>(f, d, negative, magnitude, word));
  r = r < f.low ? f.low_result : r;
  r = magnitude == kInfBits ? float_of(kInfBits) : r;
  const float limit = negative ? f.max_negative : f.max;
  float above = negative ? f.above_negative : f.above;
  if constexpr (R == Rounding::kTowardZero || R == Rounding::kUp || R == Rounding::kDown) {
    // a directed rounding leaves the range on its outer side only
    const uint32_t inner = R == Rounding::kTowardZero ? 1u : (R == Rounding::kUp ? negative : negative ^ 1u);
    above = inner & truth(magnitude < kInfBits) ? limit : above;
  }
  r = r > limit ? above : r;
  const uint32_t sign = negative & f.is_signed & (truth(r != 0.0f) | f.zero_sign);
  r = float_of(bits_of(r) | (sign << 31));
  r = negative & (f.is_signed ^ 1u) & truth(magnitude != 0) ? float_of(kNanBits) : r;
  return magnitude > kInfBits ? f.nan : r;
}

}  // namespace aqn
