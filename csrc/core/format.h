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

// ---- rounding by addition ------------------------------------------------------------------------------------------

// Between M = 2^(q + 23) and 2 M fp32 numbers lie 2^q apart. So (x + M) - M is x rounded to a multiple of 2^q, ties to
// even, for any 0 <= x < M. What is a step 2^q of an element format depends on the exponent of x alone: this rounds its
// normal numbers, its subnormal ones and integers alike, in a third of the operations of `rounded`.
//
// Where all numbers of a format are multiplied by 2^E, so are its steps: with E added to the exponents of `low` and
// `max` x is rounded to the scaled format and never scaled.
struct Spacing {
  uint32_t low;            // 2^min_exponent: numbers below are spaced as this one is
  uint32_t max;            // the largest number
  uint32_t more_negative;  // from its bits to those of the lowest number's magnitude
  uint32_t top;            // larger numbers are beyond the range, and are spaced as this one is: M must not overflow
  uint32_t lift;           // from 2^exponent to M
  uint32_t beyond;         // what lies beyond the range becomes; 0 for the limit itself
  uint32_t random_mask;

  AQN_HD explicit Spacing(const Element& f)
      : low(bits_of(exp2_of(f.min_exponent))),
        max(bits_of(f.max)),
        more_negative(bits_of(f.max_negative) - bits_of(f.max)),
        lift(static_cast<uint32_t>(23 - f.mantissa_bits) << 23),
        beyond(f.overflow == Overflow::kSaturate ? 0u
               : f.overflow == Overflow::kInf    ? kInfBits
                                                 : kNanBits),
        random_mask(~0u << ((32 - f.random_bits) & 31)) {
    top = f.tapered ? (127u + 31u) << 23 : (253u << 23) - lift;
  }

  // The least and the largest 2^E with which all constants stay in fp32's normal range.
  AQN_HD uint32_t least_scale() const {
    const uint32_t least = max < low ? max & kInfBits : low;
    return kOne - (least - kNormal);
  }
  AQN_HD uint32_t largest_scale() const { return (top & kInfBits) - (max & kInfBits) + kOne - kNormal; }

  static constexpr uint32_t kOne = 127u << 23, kNormal = 1u << 23;
};

// The kinds of elements that are rounded by addition: their rounding, whether a step depends on the exponent as that of
// HiFloat8 does, and whether negative numbers, zero included, mirror the positive ones.
template <Rounding kRounding, bool kTapered, bool kMirrored>
struct Kind {
  static constexpr Rounding rounding = kRounding;
  static constexpr bool tapered = kTapered, mirrored = kMirrored;
};

AQN_HD bool rounds_by_addition(const Element& f) {
  const bool even = f.rounding == Rounding::kNearestEven && f.mantissa_bits > 0 && !f.tapered;
  const bool other = f.rounding == Rounding::kNearestAway || f.rounding == Rounding::kStochastic;
  return (even || other) && f.is_signed && f.has_zero && !f.flush && is_nan(f.nan) && f.min_exponent >= -126 &&
         (bits_of(f.max) & kInfBits) < Spacing(f).top && !(f.tapered && f.has_negative_zero);
}
AQN_HD bool is_mirrored(const Element& f) { return f.has_negative_zero && f.max == f.max_negative; }

// What added to the bits of 2^e gives those of M. HiFloat8 has 3 fraction bits up to |e| = 3 and one less where |e|
// reaches 4, 8 and 16: so does the exponent of |e| itself.
template <class K>
AQN_HD uint32_t lift_of(const Spacing& k, uint32_t exponent) {
  if constexpr (!K::tapered) return k.lift;
  const uint32_t e = bits_of(static_cast<float>(static_cast<int32_t>(exponent - (127u << 23)))) & kInfBits;
  const uint32_t least = (127u + 23u + 1u) << 23;  // of |e| = 2
  return (e < least ? least : e) - ((127u + 23u + 1u - 20u) << 23);
}

// A magnitude rounded to a multiple of the step that belongs to M = `magic`.
template <class K>
AQN_HD float stepped(const Spacing& k, float x, float magic, uint32_t word) {
  const float even = (x + magic) - magic, step = magic * 0x1p-23f;
  if constexpr (K::rounding == Rounding::kNearestEven) return even;
  if constexpr (K::rounding == Rounding::kNearestAway) {  // x - even is exact
    const float rest = x - even;
    return rest + rest == step ? even + step : even;
  }
  // Stochastic: up where the share of the step that is dropped, as a number of 32 bits, plus the word carries.
  const float floor = even > x ? even - step : even;
  const float share = ((x - floor) * float_of((254u << 23) - bits_of(magic))) * 0x1p55f;
  const uint32_t bits = static_cast<uint32_t>(share < 0x1p32f ? share : 0.0f) & k.random_mask;
  return bits + (word & k.random_mask) < bits ? floor + step : floor;
}

// x as a number of the format, of which `low` and `limit` may be scaled; equals rounded() of the same element. A closed
// range holds all finite numbers that come, as it clamps them, and no others come.
template <class K, bool kClosed = false>
AQN_HD float spaced(const Spacing& k, float x, uint32_t low, uint32_t limit, uint32_t word) {
  const uint32_t magnitude = bits_of(x) & kAbsMask, sign = bits_of(x) & kSignBit;
  uint32_t exponent = magnitude & kInfBits;
  exponent = exponent < low ? low : exponent;
  if (!kClosed) exponent = exponent > k.top ? k.top : exponent;
  const float magic = float_of(exponent + lift_of<K>(k, exponent));
  const float r = stepped<K>(k, float_of(magnitude), magic, word);
  const uint32_t most = K::mirrored || !sign ? limit : limit + k.more_negative;
  uint32_t kept;
  if (kClosed) {
    kept = bits_of(r) > most ? most : bits_of(r);
  } else {
    kept = r > float_of(most) ? (k.beyond ? k.beyond : most) : bits_of(r);
  }
  return float_of(kept | (K::mirrored || kept != 0 ? sign : 0u));
}

}  // namespace aqn
