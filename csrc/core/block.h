// Shared scales: from the values of a block to the factor that brings them to the element format, and back.
#pragma once

#include "format.h"

namespace aqn {

enum class Scale : int {
  kNone = 0,
  // E8M0 scales
  kPowerOfTwo = 1,  // floor, ceil, rceil, even, amct: they differ in Scaling::carry_from alone
  kLeastError = 2,  // mse
  // E4M3 scales with one fp32 scale a tensor
  kTwoLevel = 3,  // te
  kTorchao = 4,
  kModelopt = 5,
  kCompressedTensors = 6,
  kFourOverSixMae = 7,
  kFourOverSixMse = 8,
  kQutlass = 9,
  // fp32 scales
  kAmax = 10,
  kEncode = 11,
  kEncodePow2 = 12,
  // three levels
  kHif4 = 13,
};

// What a scale rule needs to know of a block format (aqnsim/backends/cpu.py derives these from its dataclass).
struct Scaling {
  Scale rule;
  int rows, columns;    // of a block, columns along the axis; 0 columns for the whole axis
  int emax;             // E8M0: exponent of the element's largest binade
  uint32_t carry_from;  // E8M0: fraction bits of the largest value from which the next power of two is taken
  int zero_exponent;    // E8M0: log2 of the scale of a block of zeros
  bool finite_only;     // E8M0: NaN and Inf do not count towards the scale
  float largest;        // what a scale maps the largest magnitude to; see the rules

  AQN_HD bool divides() const {  // whether a value is divided by to_element, not multiplied with it
    return rule == Scale::kModelopt || rule == Scale::kCompressedTensors || rule == Scale::kAmax;
  }
  AQN_HD bool searches() const {  // whether the rule looks at all values of a block, not only at the largest
    return rule == Scale::kLeastError || rule == Scale::kFourOverSixMae || rule == Scale::kFourOverSixMse;
  }
  AQN_HD bool has_tensor_scale() const { return rule >= Scale::kTwoLevel && rule <= Scale::kQutlass; }
};

// How one block is brought into the element format and back: q = round(x * to_element), or x / to_element;
// y = (q * decode) * (the tensor's scale); s is what is stored.
struct BlockScale {
  float to_element, s, decode;
};

AQN_HD Rounder e4m3_rounder() {
  Element f = {};
  f.mantissa_bits = 3;
  f.min_exponent = -6;
  f.max = 448.0f;
  f.overflow = Overflow::kSaturate;
  return Rounder(f);
}

AQN_HD BlockScale power_of_two(int e) {
  e = e < -127 ? -127 : (e > 127 ? 127 : e);
  return {exp2_of(-e), exp2_of(e), exp2_of(e)};
}

// OCP MX v1.0 section 6.3: X = 2^(floor(log2 amax) - emax), from the exponent bits, or the next one; clamped to E8M0. A
// NaN or an Inf in the block makes the scale NaN, and with it the whole block.
AQN_HD int e8m0_exponent(const Scaling& k, uint32_t amax_bits) {
  const bool tiny = amax_bits < 0x00800000u;
  const uint32_t u = bits_of(float_of(amax_bits) * (tiny ? 0x1p24f : 1.0f));
  const int e =
      static_cast<int>(u >> 23) - (tiny ? 127 + 24 : 127) - k.emax + ((u & 0x007fffffu) >= k.carry_from ? 1 : 0);
  return amax_bits == 0 ? k.zero_exponent : e;
}

AQN_HD BlockScale e8m0_scale(const Scaling& k, uint32_t amax_bits) {
  const float nan = float_of(kNanBits);
  const BlockScale b = power_of_two(e8m0_exponent(k, amax_bits));
  const bool finite = amax_bits < kInfBits;
  return {finite ? b.to_element : nan, finite ? b.s : nan, finite ? b.s : nan};
}

AQN_HD float at_most_float_max(float x) { return x > kFloatMax ? kFloatMax : x; }

AQN_HD float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// NVFP4's scale of a tensor, in the order of operations of the library that the rule names. All divisions are IEEE.
struct TensorScale {
  float encode;  // what brings the tensor's scales into E4M3
  float decode;  // what multiplies every dequantised value; 1 where the block's decode holds it already
  float stored;

  AQN_HD TensorScale(const Scaling& k, float amax) : encode(1.0f), decode(1.0f), stored(1.0f) {
    if (k.rule == Scale::kTorchao || k.rule == Scale::kModelopt) {
      encode = stored = amax / 2688.0f;
    } else if (k.rule == Scale::kCompressedTensors) {
      encode = 2688.0f * (1.0f / (amax < 0x1p-126f ? 0x1p-126f : amax));  // so torch divides a number by a tensor
      encode = stored = is_finite(encode) ? encode : 1.0f;
    } else if (k.rule == Scale::kQutlass) {  // a block's scale holds its largest magnitude itself
      encode = 6.0f;
      decode = stored = 1.0f / 6.0f;
    } else if (k.has_tensor_scale()) {
      encode = at_most_float_max(k.largest / amax);
      encode = (amax == 0.0f || encode == 0.0f) ? 1.0f : encode;
      decode = stored = amax / k.largest;
    }
  }
};

AQN_HD BlockScale two_level_scale(const TensorScale& t, const Rounder& e4m3, float wanted) {
  const float s = e4m3(wanted);
  return {at_most_float_max(1.0f / (s * (1.0f / t.encode))), s, s};
}

AQN_HD BlockScale nvfp4_scale(const Scaling& k, const TensorScale& t, const Rounder& e4m3, float amax) {
  if (k.rule == Scale::kTorchao) {
    const float s = e4m3(clamped((amax / 6.0f) / t.encode, 0x1p-6f, 448.0f));
    return {(1.0f / t.encode) / s, s, t.encode * s};
  }
  if (k.rule == Scale::kModelopt) {
    const float wanted = amax / (6.0f * t.encode);
    const float s = e4m3(clamped(wanted == 0.0f ? 1.0f : wanted, 0x1p-9f, 448.0f));
    return {s * t.encode, s, s * t.encode};
  }
  if (k.rule == Scale::kCompressedTensors) {
    const float rounded_scale = e4m3((amax / 6.0f) * t.encode);
    const float s = rounded_scale == 0.0f ? 0.125f : rounded_scale;
    return {s / t.encode, s, s / t.encode};
  }
  if (k.rule == Scale::kQutlass) {
    const BlockScale b = two_level_scale(t, e4m3, t.encode * (amax * (1.0f / 6.0f)));
    return {b.s == 0.0f ? 0.0f : b.to_element, b.s, b.s};
  }
  return two_level_scale(t, e4m3, amax * (t.encode * (1.0f / 6.0f)));
}

AQN_HD BlockScale fp32_scale(const Scaling& k, float amax) {
  if (k.rule == Scale::kAmax) {
    const float quotient = amax / k.largest;
    const float s = quotient == 0.0f ? 1.0f : quotient;
    return {s, s, s};
  }
  float encode = at_most_float_max(k.largest / amax);
  encode = (amax == 0.0f || !is_finite(amax)) ? 1.0f : encode;
  encode = k.rule == Scale::kEncodePow2 ? float_of(bits_of(encode) & 0xff800000u) : encode;
  return {encode, 1.0f / encode, 1.0f / encode};
}

}  // namespace aqn
