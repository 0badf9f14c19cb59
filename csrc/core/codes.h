// Codes of a format's values: element value <-> code, for any format by data. What is encoded must be on the format's
// grid; aqnsim/reference/codes.py is the definition.
#pragma once

#include "format.h"

namespace aqn {

enum class Spelling : int { kFloat = 0, kInteger = 1, kHif8 = 2 };

// How a format spells its values (aqnsim/backends/cpu.py derives these from its dataclass).
struct Codes {
  Spelling spelling;
  int bits;           // of a code, sign included
  int mantissa_bits;  // explicit fraction bits; of an integer, all but the sign
  int min_exponent;   // numbers below 2^min_exponent are spaced as those above are
  bool is_signed;
  bool has_zero;           // else the field 0 is an exponent too
  bool has_negative_zero;  // else a zero has no sign
  int inf, nan;            // their codes without a sign; -1 for none

  AQN_HD uint32_t sign_bit() const { return is_signed ? 1u << (bits - 1) : 0u; }
};

AQN_HD float at_least(float x, float low) { return x < low ? low : x; }
AQN_HD float at_most(float x, float high) { return x > high ? high : x; }

// 2^e for -149 <= e <= 127.
AQN_HD float any_exp2_of(int e) {
  const uint32_t normal = static_cast<uint32_t>(e + 127) << 23,
                 subnormal = 1u << (static_cast<uint32_t>(e + 149) & 31u);
  return float_of(e >= -126 ? normal : subnormal);
}

// ---- HiFloat8 (arXiv 2409.16626): a prefix code for the width of the exponent
// ----------------------------------------

// The code, without its sign, of a magnitude on the grid that is neither Inf nor NaN.
AQN_HD uint32_t hif8_code_of(uint32_t magnitude) {
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t negative = truth(exponent < 0);
  const uint32_t size = static_cast<uint32_t>(negative ? -exponent : exponent);
  const uint32_t width = 1u + truth(size >= 4u) + truth(size >= 8u);  // of the exponent's bits below its leading 1
  const uint32_t fraction = (magnitude & 0x007fffffu) >> (19u + width);
  const uint32_t wide = width << 5 | negative << 4 | (size & ((1u << width) - 1u)) << (4u - width) | fraction;
  const uint32_t narrow = (size == 0u ? 8u : 16u | negative << 3) | (magnitude & 0x007fffffu) >> 20;
  const uint32_t normal = size < 2u ? narrow : wide;
  const uint32_t small = magnitude == 0u ? 0u : static_cast<uint32_t>(exponent + 23);  // one value a binade
  return exponent < -15 ? small : normal;
}

// The magnitude of such a code.
AQN_HD float hif8_value_of(uint32_t low) {
  const uint32_t width = low >> 5, wide_fraction_bits = 4u - width;
  const uint32_t wide = 1u << width | ((low >> wide_fraction_bits) & ((1u << width) - 1u));
  const uint32_t size = low >= 32u ? wide : low >> 4;  // 0 for 8..15, 1 for 16..31
  const uint32_t negative = low >= 32u ? (low >> 4) & 1u : (low >> 3) & (low >> 4) & 1u;
  const uint32_t fraction_bits = low >= 32u ? wide_fraction_bits : 3u;
  const uint32_t fraction = (low & ((1u << fraction_bits) - 1u)) << (23u - fraction_bits);
  const uint32_t exponent = negative ? 127u - size : 127u + size;
  const uint32_t small = low == 0u ? 0u : (low + (127u - 23u)) << 23;
  return float_of(low < 8u ? small : exponent << 23 | fraction);
}

// ---- any format ----------------------------------------------------------------------------------------------------

AQN_HD uint32_t float_code_of(const Codes& k, uint32_t magnitude) {
  const bool tiny = magnitude < 0x00800000u;  // an fp32 subnormal, or zero
  const uint32_t u = bits_of(float_of(magnitude) * (tiny ? 0x1p24f : 1.0f));
  const int exponent = static_cast<int>(u >> 23) - (tiny ? 127 + 24 : 127);
  const int below = exponent < k.min_exponent ? k.min_exponent - exponent : 0;
  const int shift = 23 - k.mantissa_bits + (below < 31 ? below : 31);
  const uint32_t significand = magnitude == 0u ? 0u : (u & 0x007fffffu) | 0x00800000u;
  const uint32_t steps = significand >> (shift < 31 ? shift : 31);
  const uint32_t binades = static_cast<uint32_t>(exponent + below - k.min_exponent);
  return steps + (binades << k.mantissa_bits) - (k.has_zero ? 0u : 1u << k.mantissa_bits);
}

AQN_HD float float_value_of(const Codes& k, uint32_t low) {
  const uint32_t field = low >> k.mantissa_bits, hidden = 1u << k.mantissa_bits;
  const bool subnormal = k.has_zero && field == 0u;
  const uint32_t significand = (low & (hidden - 1u)) | (subnormal ? 0u : hidden);
  const int binade = static_cast<int>(field) - (k.has_zero && field != 0u ? 1 : 0);
  return static_cast<float>(static_cast<int32_t>(significand)) * any_exp2_of(k.min_exponent + binade - k.mantissa_bits);
}

// The code of a value that the format holds; 0 for a NaN that it does not hold.
AQN_HD uint32_t code_of(const Codes& k, float x) {
  const uint32_t magnitude = bits_of(x) & kAbsMask, negative = bits_of(x) >> 31;
  if (magnitude > kInfBits) return k.nan < 0 ? 0u : static_cast<uint32_t>(k.nan);
  if (k.spelling == Spelling::kInteger) {
    const float steps = x * any_exp2_of(k.mantissa_bits - k.min_exponent);
    return static_cast<uint32_t>(static_cast<int32_t>(steps)) & ((1u << (k.bits - 1) << 1) - 1u);
  }
  const uint32_t finite = k.spelling == Spelling::kHif8 ? hif8_code_of(magnitude) : float_code_of(k, magnitude);
  const uint32_t code = magnitude == kInfBits ? static_cast<uint32_t>(k.inf) : finite;
  return code | (negative && (code != 0u || k.has_negative_zero) ? k.sign_bit() : 0u);
}

// The value of a code.
AQN_HD float value_of(const Codes& k, uint32_t code) {
  const uint32_t sign = code & k.sign_bit(), low = code ^ sign;
  if (k.spelling == Spelling::kInteger) {
    const int32_t steps = static_cast<int32_t>(low) - static_cast<int32_t>(sign);
    return static_cast<float>(steps) * any_exp2_of(k.min_exponent - k.mantissa_bits);
  }
  const bool hif8 = k.spelling == Spelling::kHif8;
  const float finite = hif8 ? hif8_value_of(low) : float_value_of(k, low);
  const float magnitude = k.inf >= 0 && low == static_cast<uint32_t>(k.inf) ? float_of(kInfBits) : finite;
  const float value = float_of(bits_of(magnitude) | (sign ? kSignBit : 0u));
  const bool beyond = k.inf >= 0 && low > static_cast<uint32_t>(k.inf);  // the other NaNs of an IEEE-like format
  const bool is_nan = k.nan >= 0 && (code == static_cast<uint32_t>(k.nan) || low == static_cast<uint32_t>(k.nan) ||
                                     (k.spelling == Spelling::kFloat && beyond));
  return is_nan ? float_of(kNanBits) : value;
}

// ---- rounding straight to a code -----------------------------------------------------------------------------------

// code_of(round(x)) of a plain element with fraction bits, to nearest even, in half the operations.
struct PlainEncoder {
  uint32_t least, limit, magic, offset, shift, nan, sign_shift, sign;

  PlainEncoder(const Element& f, const Codes& k)
      : least(bits_of(exp2_of(f.min_exponent))),
        limit(limit_of(f)),
        magic(static_cast<uint32_t>(23 - f.mantissa_bits) << 23),
        offset(magic + (least >> (23 - f.mantissa_bits))),
        shift(static_cast<uint32_t>(23 - f.mantissa_bits)),
        nan(code_of(k, float_of(kNanBits))),
        sign_shift(static_cast<uint32_t>(32 - k.bits)),
        sign(k.sign_bit()) {}

  static bool fits(const Element& f) {
    const bool signed_above = f.overflow != Overflow::kNan;
    return f.is_plain() && f.mantissa_bits > 0 && signed_above && (limit_of(f) >> 23) + 23 - f.mantissa_bits < 255;
  }

  // Adding a power of two, by the value's own exponent, leaves the significand in steps of the format in the sum's low
  // bits: the addition itself rounds to nearest even.
  AQN_HD uint32_t operator()(float x) const {
    const uint32_t given = bits_of(x) & kAbsMask, magnitude = given < limit ? given : limit;
    const uint32_t exponent = magnitude & kInfBits, binade = exponent > least ? exponent : least;
    const uint32_t sum = bits_of(float_of(magnitude) + float_of(binade + magic));
    const uint32_t code = (sum - binade) + ((binade >> shift) - offset);
    return given > kInfBits ? nan : code | ((bits_of(x) >> sign_shift) & sign);
  }

 private:
  // The largest number, or the one after it, whose code is that of Inf.
  static uint32_t limit_of(const Element& f) {
    return bits_of(f.max) + (f.overflow == Overflow::kInf ? 1u << (23 - f.mantissa_bits) : 0u);
  }
};

// code_of(round(x)) of an integer, to nearest even.
struct IntegerEncoder {
  float to_steps, low, high;
  uint32_t mask, nan;

  IntegerEncoder(const Element& f, const Codes& k)
      : to_steps(any_exp2_of(k.mantissa_bits - k.min_exponent)),
        low(-f.max_negative * to_steps),
        high(f.max * to_steps),
        mask((1u << k.bits) - 1u),
        nan(code_of(k, f.nan)) {}

  static bool fits(const Element& f, const Codes& k) {
    return k.spelling == Spelling::kInteger && f.rounding == Rounding::kNearestEven && k.bits <= 8 && !f.flush;
  }

  AQN_HD uint32_t operator()(float x) const {
    const float steps = at_most(at_least(x * to_steps, low), high);
    const uint32_t code = bits_of(steps + 0x1.8p23f) & mask;
    return is_nan(x) ? nan : code;
  }
};

// code_of(round(x)) of HiFloat8, ties away from zero.
struct Hif8Encoder {
  uint32_t above, nan;

  Hif8Encoder(const Element& f, const Codes& k)
      : above(f.overflow == Overflow::kInf ? static_cast<uint32_t>(k.inf) : code_of(k, f.max)),
        nan(static_cast<uint32_t>(k.nan)) {}

  static bool fits(const Element& f) {
    return f.tapered && f.rounding == Rounding::kNearestAway && f.overflow != Overflow::kNan && !f.flush;
  }

  AQN_HD uint32_t operator()(float x) const {
    const uint32_t given = bits_of(x) & kAbsMask;
    const int exponent = static_cast<int>(given >> 23) - 127;
    const uint32_t half = 1u << (22 - hif8_fraction_bits(exponent));
    const uint32_t least = given >= bits_of(0x1p-23f) ? bits_of(0x1p-22f) : 0u;
    const uint32_t rounded = exponent < -22 ? least : (given + half) & ~(half + half - 1u);
    const uint32_t code = rounded > bits_of(32768.0f) ? above : hif8_code_of(rounded);
    const uint32_t sign = code == 0u ? 0u : (bits_of(x) >> 24) & 0x80u;
    return given > kInfBits ? nan : code | sign;
  }
};

}  // namespace aqn
