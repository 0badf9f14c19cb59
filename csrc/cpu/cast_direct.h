// The loops that most casts run, over U values at a time: rounding by addition (see Spacing), and the largest
// magnitudes of many blocks. Casts by powers of two, or without a scale, are direct: x is rounded to the scaled format
// and never scaled.
#pragma once

#include "../core/block.h"
#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// A value's bits.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
using Pair = uint32_t __attribute__((may_alias));  // two neighbours in bfloat16
using Half = uint16_t __attribute__((may_alias));

AQN_HD uint32_t own_bits(float x) { return bits_of(x); }
AQN_HD uint16_t own_bits(bf16 x) { return x.bits; }
AQN_HD constexpr uint16_t upper(uint32_t bits) { return static_cast<uint16_t>(bits >> 16); }
AQN_HD constexpr uint16_t sum(uint16_t a, uint16_t b) { return static_cast<uint16_t>(a + b); }
template <class T>
AQN_HD constexpr Bits<T> narrowed(uint32_t bits) {
  return static_cast<Bits<T>>(bits >> (32 - 8 * sizeof(T)));
}

// U values with the smallest normal number and the limit of all, or of each lane.
template <class K, int U, bool kPerLane, bool kClosed>
AQN_HD void direct(float* y, const float* x, const Spacing k, const uint32_t* low, const uint32_t* limit) {
  const uint32_t l = low[0], m = limit[0];
#pragma omp simd
  for (int i = 0; i < U; ++i) y[i] = spaced<K, kClosed>(k, x[i], kPerLane ? low[i] : l, kPerLane ? limit[i] : m, 0u);
}

// lift_of() for the upper halves.
template <class K>
AQN_HD uint16_t upper_lift(const Spacing& k, uint16_t exponent) {
  if constexpr (!K::tapered) return upper(k.lift);
  const uint16_t up = sum(exponent, -0x3f80), down = sum(0x3f80, -exponent), a = std::min(up, down);
  const uint16_t narrow = a > 3 << 7 ? 0x80 : 0, narrower = a > 7 << 7 ? 0x80 : 0, none = a > 15 << 7 ? 0x80 : 0;
  return sum(sum(20 << 7, narrow), sum(narrower, none));
}

// The same in lanes of 16 bits but for the additions themselves, for which the even and the odd elements of each pair
// become fp32 in place: no lane crosses another. The result of a rounding has no more significant bits than a bfloat16
// and so is one. A bfloat16 that is no tie stays none with one of fp32's last bits set, and a tie goes away from zero.
template <class K, int U, bool kPerLane, bool kClosed>
AQN_HD void direct(bf16* to, const bf16* from, const Spacing k, const uint16_t* low, const uint16_t* limit) {
  const Half* x = reinterpret_cast<const Half*>(from);
  Half* y = reinterpret_cast<Half*>(to);
  constexpr uint16_t kAbs = 0x7fff, kSign = 0x8000, kInf = 0x7f80;
  constexpr bool kAway = K::rounding == Rounding::kNearestAway;
  const uint16_t l = low[0], u = limit[0], top = upper(k.top);
  alignas(64) Half magnitude[U], magic[U], rounded[U];
#pragma omp simd
  for (int i = 0; i < U; ++i) {
    const uint16_t m = x[i] & kAbs, e = x[i] & kInf, least = kPerLane ? low[i] : l;
    const uint16_t at_least = std::max(e, least), exponent = kClosed ? at_least : std::min(at_least, top);
    magnitude[i] = m;
    magic[i] = sum(exponent, upper_lift<K>(k, exponent));
  }
  const Pair *pairs = reinterpret_cast<const Pair*>(magnitude), *magics = reinterpret_cast<const Pair*>(magic);
  Pair* results = reinterpret_cast<Pair*>(rounded);
#pragma omp simd
  for (int i = 0; i < U / 2; ++i) {
    const float even = float_of(pairs[i] << 16 | kAway), odd = float_of((pairs[i] & 0xffff0000u) | kAway);
    const float m = float_of(magics[i] << 16), n = float_of(magics[i] & 0xffff0000u);
    results[i] = bits_of((even + m) - m) >> 16 | (bits_of((odd + n) - n) & 0xffff0000u);
  }
  if (kClosed) {
#pragma omp simd
    for (int i = 0; i < U; ++i) {
      const uint16_t r = rounded[i], most = kPerLane ? limit[i] : u, kept = std::min(r, most);
      const uint16_t sign = x[i] & kSign, has_sign = K::mirrored || kept ? kSign : 0;
      y[i] = kept | (sign & has_sign);
    }
  } else {
    // The limit as bfloat16 has it: cut off, to be compared with, or rounded, to become a result.
    const uint16_t beyond = upper(k.beyond), replaced = k.beyond ? 0xffff : 0;
    const uint16_t up = sum(upper(bits_of(to_bf16(float_of(k.max)))), -upper(k.max));
#pragma omp simd
    for (int i = 0; i < U; ++i) {
      const uint16_t r = rounded[i], most = kPerLane ? limit[i] : u, own = sum(most, up);
      const uint16_t above = (own & ~replaced) | (beyond & replaced);
      const uint16_t past = sum(r, ~most), span = sum(kInf, ~most);  // less most, less one: NaN lies beyond Inf
      uint16_t kept = past <= span ? above : r;
      if (kAway) kept = magnitude[i] == kInf ? above : kept;  // with that bit set Inf was a NaN
      const uint16_t sign = x[i] & kSign, has_sign = K::mirrored || kept ? kSign : 0;
      y[i] = kept | (sign & has_sign);
    }
  }
}

// y = (round(x * to_element) * decode) * t, or x / to_element.
template <class K, int U, bool kPerLane, bool kDivides>
AQN_HD void scaled(float* y, const float* x, const Spacing k, const float* to_element, const float* decode, float t) {
  const float factor = to_element[0], back = decode[0];
#pragma omp simd
  for (int i = 0; i < U; ++i) {
    const float f = kPerLane ? to_element[i] : factor, d = kPerLane ? decode[i] : back;
    y[i] = (spaced<K>(k, kDivides ? x[i] / f : x[i] * f, k.low, k.max, 0u) * d) * t;
  }
}

// A bfloat16, ties to even, in the upper half. Its NaNs come from bfloat16 or from here: their lower halves are zeros,
// which rounding leaves.
AQN_HD uint32_t nearest_upper(float x) { return bits_of(x) + 0x7fffu + (bits_of(x) >> 16 & 1u); }

template <class K, int U, bool kPerLane, bool kDivides>
AQN_HD void scaled(bf16* y, const bf16* x, const Spacing k, const float* to_element, const float* decode, float t) {
  const float factor = to_element[0], back = decode[0];
  const Pair* from = reinterpret_cast<const Pair*>(x);
  Pair* to = reinterpret_cast<Pair*>(y);
#pragma omp simd
  for (int i = 0; i < U / 2; ++i) {
    const float f = kPerLane ? to_element[2 * i] : factor, g = kPerLane ? to_element[2 * i + 1] : factor;
    const float d = kPerLane ? decode[2 * i] : back, e = kPerLane ? decode[2 * i + 1] : back;
    const float even = float_of(from[i] << 16), odd = float_of(from[i] & 0xffff0000u);
    const float p = (spaced<K>(k, kDivides ? even / f : even * f, k.low, k.max, 0u) * d) * t;
    const float q = (spaced<K>(k, kDivides ? odd / g : odd * g, k.low, k.max, 0u) * e) * t;
    to[i] = nearest_upper(p) >> 16 | (nearest_upper(q) & 0xffff0000u);
  }
}

// ---- largest magnitudes --------------------------------------------------------------------------------------------

// Neighbours by neighbours, until one value is left of each of N runs of L.
template <int N, int L>
AQN_HD void reduce_max(uint32_t* to, const uint32_t* from) {
  if constexpr (L == 1) {
    std::copy_n(from, N, to);
  } else {
    alignas(64) uint32_t half[N * L / 2];
#pragma omp simd
    for (int i = 0; i < N * L / 2; ++i) half[i] = std::max(from[2 * i], from[2 * i + 1]);
    reduce_max<N, L / 2>(to, half);
  }
}

// Largest magnitudes of U values in 16 lanes, or of each pair of bfloat16. Magnitudes stand one bit to the left: a
// shift drops the sign, and what follows a bfloat16 in its lane decides nothing that is kept.
template <int U>
AQN_HD void fold(uint32_t* lanes, const float* x) {
  for (int start = 0; start < U; start += 16)
#pragma omp simd
    for (int i = 0; i < 16; ++i) lanes[i] = std::max(start ? lanes[i] : 0u, bits_of(x[start + i]) << 1);
}
template <int U>
AQN_HD void fold(uint32_t* lanes, const bf16* x) {
  const Pair* pairs = reinterpret_cast<const Pair*>(x);
#pragma omp simd
  for (int i = 0; i < U / 2; ++i) lanes[i] = std::max(pairs[i] << 17, pairs[i] << 1);
}

// The bits of the largest magnitude of each of N blocks of `units` times U values.
template <class T, int N, int U>
AQN_HD void block_maxima(uint32_t* amax, const T* x, int units) {
  constexpr int kLanes = sizeof(T) == 4 ? 16 : U / 2;
  constexpr uint32_t kKept = sizeof(T) == 4 ? kAbsMask : kAbsMask & 0xffff0000u;
  alignas(64) uint32_t lanes[N * kLanes], more[kLanes];
  for (int b = 0; b < N; ++b) {
    uint32_t* own = lanes + b * kLanes;
    fold<U>(own, x + b * units * U);
    for (int u = 1; u < units; ++u) {
      fold<U>(more, x + (b * units + u) * U);
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) own[i] = std::max(own[i], more[i]);
    }
  }
  reduce_max<N, kLanes>(amax, lanes);
#pragma omp simd
  for (int b = 0; b < N; ++b) amax[b] = amax[b] >> 1 & kKept;
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
