// How an op misses the right answer: one error model of a chain, applied to one value.
#pragma once

#include "bits.h"

namespace aqn {

enum class ErrorKind : int {
  kRelativeGaussian = 0,
  kAbsoluteGaussian = 1,
  kSystematicBias = 2,
  kDeadZone = 3,
  kSaturation = 4,
  kSpike = 5,
  kStuck = 6,
  kBitFlip = 7,
};

AQN_HD constexpr bool has_rate(ErrorKind k) {
  return k == ErrorKind::kSpike || k == ErrorKind::kStuck || k == ErrorKind::kBitFlip;
}
AQN_HD constexpr bool draws_normal(ErrorKind k) {
  return k == ErrorKind::kRelativeGaussian || k == ErrorKind::kAbsoluteGaussian || k == ErrorKind::kSpike;
}

// A model with its numbers, and with where its random ones come from: aqnsim/rng.py has resolved how often it draws.
struct ErrorModel {
  ErrorKind kind;
  uint64_t key;       // of the normals of a Gaussian model, of the decisions of one with a rate
  uint64_t hit_key;   // of what a hit draws: a spike's normal, the place of a flipped bit
  uint32_t word;      // the counter's last word, for both keys
  uint32_t last_hit;  // the largest random word that is a hit
  float a, b;         // sigma; gain, offset; threshold; limit; size; value
  bool by_magnitude;  // a relative error is one of |A| @ |B|, not of |y|
  int lanes;          // decisions are made by column mod lanes alone; 0: by element
  int bit;            // which bit flips; -1: drawn
  int low_bit;        // where the stored pattern begins in that of fp32: 16 for bf16
};

// y after the model, with what the element draws: a normal z, whether it is hit, and a word for the place of a flipped
// bit. A relative error is relative to |unit|; a bit flips in y as the output holds it. Infinities and NaNs pass
// unchanged.
template <ErrorKind Kind>
AQN_HD float missed(const ErrorModel& m, float y, float unit, float z, bool hit, uint32_t word) {
  float result = y;
  if (Kind == ErrorKind::kRelativeGaussian) {
    result = y + (m.a * z) * abs_of(unit);
  } else if (Kind == ErrorKind::kAbsoluteGaussian) {
    result = y + m.a * z;
  } else if (Kind == ErrorKind::kSystematicBias) {
    result = y + (m.a * y + m.b);
  } else if (Kind == ErrorKind::kDeadZone) {
    result = abs_of(y) < m.a ? 0.0f : y;
  } else if (Kind == ErrorKind::kSaturation) {
    result = y > m.a ? m.a : (y < -m.a ? -m.a : y);
  } else if (Kind == ErrorKind::kSpike) {
    result = hit ? m.a * z : y;
  } else if (Kind == ErrorKind::kStuck) {
    result = hit ? m.a : y;
  } else if (Kind == ErrorKind::kBitFlip) {
    // 32 places are named by the word's top five bits, the 16 of bf16 by its top four.
    const uint32_t bit = m.bit < 0 ? word >> (m.low_bit ? 28 : 27) : static_cast<uint32_t>(m.bit);
    result = hit ? float_of(bits_of(y) ^ (1u << (bit + static_cast<uint32_t>(m.low_bit)))) : y;
  }
  return is_finite(y) ? result : y;
}

}  // namespace aqn
