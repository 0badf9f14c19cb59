// HiFloat4 (arXiv 2602.11287), in the order of operations of Ascend's model compression toolkit.
#pragma once

#include "block.h"

namespace aqn {

// The scales of a block of 64: one UE6M2 value, one bit for each 8 elements and one for each 4.
struct Hif4 {
  float scale, inverse;
  uint32_t levels;  // the UE6M2 code, then 8 bits, then 16
  bool finite;

  AQN_HD int shift(int group) const {  // of a group of 4: how many of its two bits are set
    return static_cast<int>((levels >> (8 + group / 2)) & 1u) + static_cast<int>((levels >> (16 + group)) & 1u);
  }
};

// `of4`: the bits of the largest magnitude of each group of 4.
AQN_HD Hif4 hif4_scales(const uint32_t* of4) {
  Hif4 h = {};
  uint32_t of64 = 0;
  for (int g = 0; g < 16; ++g) of64 = of4[g] > of64 ? of4[g] : of64;
  h.finite = of64 < kInfBits;
  if (!h.finite) {
    h.scale = h.inverse = float_of(kNanBits);
    h.levels = 0xffu;
    return h;
  }
  const float wanted = to_bf16(float_of(of64) * to_bf16(1.0f / 7.0f));
  Element ue6m2 = {};
  ue6m2.mantissa_bits = 2;
  ue6m2.min_exponent = -48;
  ue6m2.max = 49152.0f;
  h.scale = Rounder(ue6m2)(clamped(wanted, 0x1p-48f, 49152.0f));
  h.inverse = to_bf16(1.0f / h.scale);
  h.levels = (bits_of(h.scale) >> 21) - ((127u - 48u) << 2);
  for (int g = 0; g < 8; ++g) {
    const uint32_t of8 = of4[2 * g] > of4[2 * g + 1] ? of4[2 * g] : of4[2 * g + 1];
    const uint32_t outer = float_of(of8) * h.inverse >= 4.0f ? 1u : 0u;
    h.levels |= outer << (8 + g);
    for (int i = 2 * g; i < 2 * g + 2; ++i) {
      const float reached = (float_of(of4[i]) * h.inverse) * (outer ? 0.5f : 1.0f);
      h.levels |= (reached >= 2.0f ? 1u : 0u) << (16 + i);
    }
  }
  return h;
}

// What is rounded to an element, and what an element stands for.
AQN_HD float hif4_scaled(const Hif4& h, int shift, float x) {
  const float m = to_bf16((abs_of(x) * h.inverse) * exp2_of(-shift));
  const float signed_m = x < 0.0f ? -m : m;
  return h.finite ? signed_m : float_of(kNanBits);
}
AQN_HD float hif4_decode(const Hif4& h, int shift) { return exp2_of(shift) * h.scale; }

}  // namespace aqn
