// Rounding to an element format whose parameters are data: one function for every e{E}m{M} format.
#pragma once

#include "bits.h"

namespace aqn {

enum class Overflow : int { kSaturate = 0, kInf = 1, kNan = 2 };

// What a rounding needs to know of a format (aqnsim/formats.py derives these from its dataclass).
struct Element {
  int mantissa_bits;  // explicit fraction bits, 0..22
  int min_exponent;   // exponent of the smallest normal number
  float max;          // largest finite magnitude
  Overflow overflow;  // what happens above it
};

// The same, as the constants that the loop needs: made once a call.
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
                                                : float_of(f.overflow == Overflow::kInf ? kInfBits : 0x7fc00000u)) {}

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

}  // namespace aqn
