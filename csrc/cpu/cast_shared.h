// What all cast loops share: largest magnitudes, constants of a format, rounding of arrays, and measuring.
#pragma once

#include "../core/hif4.h"
#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// ---- largest magnitude ---------------------------------------------------------------------------------------------

template <class T>
float amax_typed(const T* x, int64_t n, int threads) {
  constexpr int64_t kChunk = 65536;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<uint32_t> parts(chunks, 0);
  for_chunks(chunks, threads, [&](int64_t c) {
    const int64_t last = std::min(n, (c + 1) * kChunk);
    uint32_t m = 0;
    for (int64_t i = c * kChunk; i < last; ++i) m = std::max(m, bits_of(load(x[i])) & kAbsMask);
    parts[c] = m;
  });
  uint32_t m = 0;
  for (const uint32_t p : parts) m = std::max(m, p);  // NaN has the largest bits: it survives
  return float_of(m);
}

float amax(const void* x, Dtype dtype, int64_t n, int threads) {
  return dtype == Dtype::kFloat32 ? amax_typed(static_cast<const float*>(x), n, threads)
                                  : amax_typed(static_cast<const bf16*>(x), n, threads);
}

AQN_HD uint32_t largest_bits(const float* x, int n) {
  uint32_t m = 0;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) m = std::max(m, bits_of(x[i]) & kAbsMask);
  return m;
}

AQN_HD uint32_t largest_finite_bits(const float* x, int n) {
  uint32_t m = 0;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]) & kAbsMask;
    m = std::max(m, bits < kInfBits ? bits : 0u);
  }
  return m;
}

// ---- what all loops share ------------------------------------------------------------------------------------------

struct CastConstants {
  Element element;
  Rounder round, e4m3;
  Scaling scaling;
  TensorScale tensor;
  float tensor_amax;
  bool unscaled;

  explicit CastConstants(const CastArgs& a)
      : element(a.element),
        round(a.element),
        e4m3(e4m3_rounder()),
        scaling(a.scaling),
        tensor(a.scaling, a.tensor_amax),
        tensor_amax(a.tensor_amax),
        unscaled(a.unscaled) {}

  AQN_HD BlockScale block_scale(uint32_t amax_bits) const {
    if (scaling.rule == Scale::kPowerOfTwo) return e8m0_scale(scaling, amax_bits);
    if (scaling.has_tensor_scale()) return nvfp4_scale(scaling, tensor, e4m3, float_of(amax_bits));
    return fp32_scale(scaling, float_of(amax_bits));
  }
  AQN_HD void block_scales(float* to_element, float* s, const uint32_t* amax, int n) const {
    const Rounder e4m3_round = e4m3;
    const TensorScale t = tensor;
    const Scaling k = scaling;
    if (k.rule == Scale::kPowerOfTwo) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = e8m0_scale(k, amax[i]);
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = two_level_scale(t, e4m3_round, float_of(amax[i]) * (t.encode * (1.0f / 6.0f)));
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    }
  }
  // The factors after rounding; 1 where the elements themselves are wanted.
  AQN_HD float decode() const { return unscaled ? 1.0f : tensor.decode; }
  AQN_HD float decode(const BlockScale& b) const { return unscaled ? 1.0f : b.decode; }
};

// y = (round(x * to_element) * s) * t. The second factor t is 1 except for two-level scales: multiplying by it is exact
// then. Everything is passed by value: the compiler vectorises only what it knows not to change under the loop.
AQN_HD void cast_all(float* y, const float* x, int n, const Rounder round, const float to_element, const float s,
                     const float t) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = (round(x[i] * to_element) * s) * t;
}

AQN_HD void multiply_all(float* y, const float* x, int n, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = x[i] * factor;
}

template <Rounding R>
void round_loop(float* y, const float* x, const uint32_t* words, int n, const Grid f) {
  if (words) {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], words[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], 0u);
  }
}

// Any element format, any rounding.
void round_all(float* y, const float* x, const uint32_t* words, int n, const Element& f) {
  const Grid g(f);
  switch (f.rounding) {
    case Rounding::kNearestEven:
      return round_loop<Rounding::kNearestEven>(y, x, words, n, g);
    case Rounding::kNearestAway:
      return round_loop<Rounding::kNearestAway>(y, x, words, n, g);
    case Rounding::kNearestDown:
      return round_loop<Rounding::kNearestDown>(y, x, words, n, g);
    case Rounding::kTowardZero:
      return round_loop<Rounding::kTowardZero>(y, x, words, n, g);
    case Rounding::kUp:
      return round_loop<Rounding::kUp>(y, x, words, n, g);
    case Rounding::kDown:
      return round_loop<Rounding::kDown>(y, x, words, n, g);
    case Rounding::kStochastic:
      return round_loop<Rounding::kStochastic>(y, x, words, n, g);
    case Rounding::kHif8Hybrid:
      return round_loop<Rounding::kHif8Hybrid>(y, x, words, n, g);
  }
}

// What a cast did to n values: x in, y stored, and what was rounded to the element format.
AQN_HD void measure_cast(const float* x, const float* y, const float* scaled, int n, const Element& f, Sums& sums) {
  const float highest = f.max, lowest = -f.max_negative;
  in_lanes(n, [&](int i, int lane) {
    const float before = x[i], after = y[i], rounded = scaled[i];
    const bool finite = is_finite(before) & is_finite(after);  // one Inf must not spoil the sums of all others
    const double from = finite ? before : 0.0f, to = finite ? after : 0.0f, e = to - from;
    sums.error2[lane] += e * e;
    sums.reference2[lane] += from * from;
    sums.changed[lane] += differs(after, before) ? 1 : 0;
    sums.saturated[lane] += (rounded > highest) | (rounded < lowest) ? 1 : 0;
    sums.nonfinite[lane] += is_finite(after) ? 0 : 1;
  });
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
