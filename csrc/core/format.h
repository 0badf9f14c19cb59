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
  return a <= 3 ? 3 : a <= 7 ? 2 : a <= 15 ? 1 : 0;
}

// A finite magnitude on its way to the grid: significand * 2^(exponent - 23), of which `dropped` low bits go.
struct Dropped {
  uint32_t significand, whole, rest, half;
  int exponent, quantum, dropped, shift;
  bool odd;

  AQN_HD Dropped(const Element& f, uint32_t magnitude) {
    const bool tiny = magnitude < 0x00800000u;  // an fp32 subnormal, or zero
    const uint32_t u = bits_of(float_of(magnitude) * (tiny ? 0x1p24f : 1.0f));
    exponent = static_cast<int>(u >> 23) - (tiny ? 127 + 24 : 127);
    significand = magnitude == 0 ? 0u : (u & 0x007fffffu) | 0x00800000u;
    const int width = f.tapered ? hif8_fraction_bits(exponent) : f.mantissa_bits;
    quantum = (exponent > f.min_exponent ? exponent : f.min_exponent) - width;
    dropped = 23 + quantum - exponent;
    shift = dropped < 31 ? dropped : 31;
    whole = significand >> shift;
    rest = significand & ((1u << shift) - 1u);
    half = 1u << (shift - 1);
    odd = width == 0 ? whole == 1u && ((quantum + f.bias) & 1) : (whole & 1u) != 0;
  }

  AQN_HD float value(uint32_t steps) const {  // exact: steps has at most 23 bits
    const uint32_t unit = quantum >= -126 ? static_cast<uint32_t>(quantum + 127) << 23
                                          : 1u << (static_cast<uint32_t>(quantum + 149) & 31u);
    return static_cast<float>(static_cast<int32_t>(steps)) * float_of(unit);
  }
};

// The top 32 bits of the share of a step that is dropped.
AQN_HD uint32_t dropped_share(const Dropped& d) {
  const int down = d.dropped - 32;
  return d.dropped < 32 ? d.rest << ((32 - d.dropped) & 31) : (down < 32 ? d.significand >> (down & 31) : 0u);
}

template <Rounding R>
AQN_HD bool rounds_up(const Element& f, const Dropped& d, bool negative, uint32_t magnitude, uint32_t word) {
  const bool away = d.rest >= d.half;
  switch (R) {
    case Rounding::kNearestEven:
      return d.rest > d.half || (d.rest == d.half && d.odd);
    case Rounding::kNearestAway:
      return away;
    case Rounding::kNearestDown:
      return d.rest > d.half;
    case Rounding::kTowardZero:
      return false;
    case Rounding::kUp:
      return d.rest != 0 && !negative;
    case Rounding::kDown:
      return d.rest != 0 && negative;
    case Rounding::kStochastic: {  // up where share + word carries out of the random bits
      const uint32_t mask = ~0u << ((32 - f.random_bits) & 31);
      const uint32_t share = dropped_share(d) & mask;
      return share + (word & mask) < share;
    }
    case Rounding::kHif8Hybrid: {  // the 14 leading discarded bits against the 14 trailing ones; an exact value stays
      const uint32_t leading = d.rest >> ((d.shift - 14) & 31), trailing = d.rest & 0x3fffu;
      const bool pseudo = leading >= trailing && d.rest != 0 && d.exponent >= -23;
      const bool near = d.exponent > -4 && d.exponent < 4;
      return near || magnitude >= 0x47200000u ? away : pseudo;  // 40960
    }
  }
  return false;
}

// x as a number of the format; see round_to() of aqnsim/reference.py.
template <Rounding R>
AQN_HD float rounded(const Element& f, float x, uint32_t word) {
  const uint32_t magnitude = bits_of(x) & kAbsMask;
  const bool negative = (bits_of(x) & kSignBit) != 0;
  const Dropped d(f, magnitude);
  float r = d.value(d.whole + (rounds_up<R>(f, d, negative, magnitude, word) ? 1u : 0u));
  r = f.flush && r < f.min_normal ? 0.0f : r;
  r = !f.has_zero && r < f.min_normal ? f.min_normal : r;
  r = magnitude == kInfBits ? float_of(kInfBits) : r;
  const float limit = negative ? f.max_negative : f.max;
  const bool inner =
      R == Rounding::kTowardZero || (R == Rounding::kUp && negative) || (R == Rounding::kDown && !negative);
  const bool stays = f.overflow == Overflow::kSaturate || (inner && magnitude < kInfBits);
  const float above = stays ? limit : float_of(f.overflow == Overflow::kInf ? kInfBits : kNanBits);
  r = r > limit ? above : r;
  const bool sign = negative && f.is_signed && (r != 0.0f || f.has_negative_zero);
  r = float_of(bits_of(r) | (sign ? kSignBit : 0u));
  r = negative && !f.is_signed && magnitude != 0 ? float_of(kNanBits) : r;
  return magnitude > kInfBits ? f.nan : r;
}

}  // namespace aqn
