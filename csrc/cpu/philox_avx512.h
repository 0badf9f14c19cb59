// Random words and normals of one tile in AVX-512: philox4x32_10 and box_muller of core/, to the last bit, in the
// fewest instructions found. What the compiler makes of those takes twice as long.
#pragma once

// GCC 12 takes the undefined operands in its own header for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "../core/normal.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// The words of 8 Philox blocks: words 0 and 2 of block b of them, the radius words, stand in lanes 2 b and 2 b + 1 of
// one register, words 1 and 3, the angle words, in those of another.
struct Words {
  __m512i radius, angle;
};

AQN_HD __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

// What all Philox blocks of a logical row share: the round keys and, as three words of the counter are the same, one
// half of the first two rounds. In memory, from where instructions broadcast at no cost.
struct PhiloxRow {
  static constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  uint32_t key0[10], key1[10];
  uint32_t word2_of_1, word0_of_2, word2_of_2, word3_of_2;  // by round, what the rest is xored with

  AQN_HD PhiloxRow(uint64_t row, uint64_t key, uint32_t word) {
    for (uint32_t i = 0; i < 10; ++i) {
      key0[i] = static_cast<uint32_t>(key) + i * kW0;
      key1[i] = static_cast<uint32_t>(key >> 32) + i * kW1;
    }
    const uint64_t product1 = uint64_t{kM1} * static_cast<uint32_t>(row >> 32);
    const uint64_t product0 =
        uint64_t{kM0} * (static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(row) ^ key0[0]);
    word2_of_1 = word ^ key1[0];
    word0_of_2 = static_cast<uint32_t>(product1) ^ key0[1];
    word2_of_2 = static_cast<uint32_t>(product0 >> 32) ^ key1[1];
    word3_of_2 = static_cast<uint32_t>(product0);
  }
};

// Philox blocks first, first + 1, ... of a row, 8 for each of N results. A register holds one word of 8 blocks, in the
// low halves of its 64-bit lanes, where the multiplication reads; what stands in the high halves is never read. The
// order of the blocks in a register is the one in which unpacking leaves columns in order.
template <int N>
AQN_HD void philox_words(Words* out, uint32_t first, const PhiloxRow& k) {
  const auto all = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); };
  const __m512i m0 = all(k.kM0), m1 = all(k.kM1), order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i c0[N], c1[N], c2[N], c3[N];
  for (int i = 0; i < N; ++i) {
    const __m512i p0 = _mm512_mul_epu32(_mm512_add_epi32(order, all(first + 8u * static_cast<uint32_t>(i))), m0);
    c2[i] = _mm512_xor_si512(_mm512_srli_epi64(p0, 32), all(k.word2_of_1));
    c1[i] = _mm512_mul_epu32(c2[i], m1);
    c0[i] = _mm512_xor_si512(_mm512_srli_epi64(c1[i], 32), all(k.word0_of_2));
    c2[i] = _mm512_xor_si512(p0, all(k.word2_of_2));
    c3[i] = all(k.word3_of_2);
  }
  for (int round = 2; round < 9; ++round)
    for (int i = 0; i < N; ++i) {
      const __m512i p0 = _mm512_mul_epu32(c0[i], m0), p1 = _mm512_mul_epu32(c2[i], m1);
      c0[i] = xor3(_mm512_srli_epi64(p1, 32), c1[i], all(k.key0[round]));
      c2[i] = xor3(_mm512_srli_epi64(p0, 32), c3[i], all(k.key1[round]));
      c1[i] = p1;
      c3[i] = p0;
    }
  // The last round moves words 2 and 3 to the high halves as it goes.
  constexpr __mmask16 kHigh = 0xaaaa, kLow = 0x5555;
  const __m512i keys = _mm512_mask_blend_epi32(kHigh, all(k.key0[9]), all(k.key1[9]));
  const auto halves = [](__m512i low, __m512i high) {
    return _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(low), kHigh, _mm512_castsi512_ps(high)));
  };
  for (int i = 0; i < N; ++i) {
    const __m512i p0 = _mm512_mul_epu32(c0[i], m0), p1 = _mm512_mul_epu32(c2[i], m1);
    const __m512i tops =
        _mm512_castps_si512(_mm512_mask_movehdup_ps(_mm512_castsi512_ps(p0), kLow, _mm512_castsi512_ps(p1)));
    out[i].radius = xor3(tops, halves(c1[i], c3[i]), keys);
    out[i].angle = halves(p1, p0);
  }
}

// N registers of fp32, so that N independent chains of operations take turns in the pipeline.
template <int N>
struct Floats {
  __m512 v[N];

  template <class F>
  static AQN_HD Floats from(const F& f) {
    Floats r;
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  friend AQN_HD Floats operator+(const Floats& a, const Floats& b) {
    return from([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend AQN_HD Floats operator-(const Floats& a, const Floats& b) {
    return from([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend AQN_HD Floats operator*(const Floats& a, const Floats& b) {
    return from([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend AQN_HD Floats operator+(const Floats& a, float b) {
    return from([&](int i) { return a.v[i] + _mm512_set1_ps(b); });
  }
  friend AQN_HD Floats operator*(const Floats& a, float b) {
    return from([&](int i) { return a.v[i] * _mm512_set1_ps(b); });
  }
};

// Normals z0[i] and z1[i], 16 pairs each, from the words w[i]. The comments of core/normal.h hold; of what it computes,
// the factors that are powers of two are moved to where they cost nothing, and exponents are read by the instruction
// that gives them as floats.
template <int N>
AQN_HD void box_muller(const Words* w, __m512* z0, __m512* z1) {
  using F = Floats<N>;
  const auto all = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); };
  // u of (word & ~1) | 2, which is 2 m, with its exponent counted from sqrt(1/2)
  const F u = F::from([&](int i) {
    const __m512i two_m = _mm512_ternarylogic_epi32(w[i].radius, all(~1u), all(2), 0xea);  // (a & b) | c
    const __m512i bits = _mm512_castps_si512(_mm512_cvtepu32_ps(two_m));
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, all(0x003504f3u)));
  });
  const F exponent = F::from([&](int i) { return _mm512_set1_ps(31.0f) - _mm512_getexp_ps(u.v[i]); });
  const F x = F::from([&](int i) {
    const __m512i mantissa = _mm512_and_si512(_mm512_castps_si512(u.v[i]), all(0x007fffffu));
    return _mm512_castsi512_ps(_mm512_add_epi32(mantissa, all(0x3f3504f3u))) - _mm512_set1_ps(1.0f);
  });
  F q = x * (2 * 0.09272214025259018f) + 2 * -0.1411842554807663f;  // all doubled, as r2 = 2 * -ln(u)
  q = q * x + 2 * 0.14676396548748016f;
  q = q * x + 2 * -0.16592855751514435f;
  q = q * x + 2 * 0.19985127449035645f;
  q = q * x + 2 * -0.2500092089176178f;
  q = q * x + 2 * 0.3333340883255005f;
  const F x2 = x * x;
  const F log1p = ((x + x) - x2) + (x2 * x) * q;
  const F r2 = exponent * (2 * 0.6931471805599453f) - log1p;
  const F radius = F::from([&](int i) { return _mm512_sqrt_ps(r2.v[i]); });  // r2 is never below 0
  const F f = F::from([&](int i) { return _mm512_cvtepi32_ps(_mm512_slli_epi32(w[i].angle, 2)); }) * 0x1p-32f;
  const F g = f * f;
  F s = g * -0.004602163098752499f + 0.07968021929264069f;
  F c = g * 0.0009092451655305922f + -0.020862624049186707f;
  s = s * g + -0.6459634900093079f;
  c = c * g + 0.2536695599555969f;
  s = s * g + 1.5707963705062866f;
  c = c * g + -1.2337005138397217f;
  s = s * f;
  c = c * g + 1.0f;
  for (int i = 0; i < N; ++i) {
    // The sign of the cosine is the upper bit of quadrant + 1, that of the sine the upper bit of the quadrant.
    const __mmask16 odd = _mm512_test_epi32_mask(w[i].angle, all(0x40000000u));
    const __m512i next = _mm512_add_epi32(w[i].angle, all(0x40000000u));
    const auto signed_as = [&](__m512 value, __m512i sign) {  // a ^ (b & c)
      return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), sign, all(kSignBit), 0x78));
    };
    z0[i] = radius.v[i] * signed_as(_mm512_mask_blend_ps(odd, c.v[i], s.v[i]), next);
    z1[i] = radius.v[i] * signed_as(_mm512_mask_blend_ps(odd, s.v[i], c.v[i]), w[i].angle);
  }
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
