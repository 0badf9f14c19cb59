// Shared scales: from the largest magnitude of a block to the factor that elements are multiplied with.
#pragma once

#include "format.h"

namespace aqn {

enum class Scale : int { kNone = 0, kE8M0Floor = 1, kE4M3TwoLevel = 2 };

// How one block is brought into the element format and back: q = round(x * to_element), y = (q * s) * t.
struct BlockScale {
  float to_element;
  float s;  // the block's own scale: a power of two, or an E4M3 value
};

// OCP MX v1.0 section 6.3: X = 2^(floor(log2 amax) - emax), from the exponent bits, clamped to E8M0. A NaN or an Inf in
// the block makes the scale NaN, and with it the whole block.
AQN_HD BlockScale mx_floor_scale(uint32_t amax_bits, int emax) {
  const int field = static_cast<int>(amax_bits >> 23);  // 0 for zero and subnormals: below E8M0's range anyway
  int e = field - 127 - emax;
  e = e < -127 ? -127 : e;
  const float nan = float_of(0x7fc00000u);
  const bool finite = amax_bits < kInfBits;
  return {finite ? exp2_of(-e) : nan, finite ? exp2_of(e) : nan};
}

// NVFP4 with two levels, in the order of operations of NVIDIA's TransformerEngine. All divisions are IEEE.
struct TwoLevel {
  float encode;  // S_enc
  float decode;  // amax / (448 * 6): multiplies every dequantised value

  AQN_HD explicit TwoLevel(float amax) {
    constexpr float kFloatMax = 3.4028234663852886e38f;
    encode = 2688.0f / amax;
    encode = encode > kFloatMax ? kFloatMax : encode;
    encode = (amax == 0.0f || encode == 0.0f) ? 1.0f : encode;
    decode = amax / 2688.0f;
  }

  AQN_HD BlockScale block(float block_amax, const Rounder& e4m3) const {
    constexpr float kFloatMax = 3.4028234663852886e38f;
    const float s = e4m3(block_amax * (encode * (1.0f / 6.0f)));
    const float inverse = 1.0f / (s * (1.0f / encode));
    return {inverse > kFloatMax ? kFloatMax : inverse, s};
  }
};

}  // namespace aqn
