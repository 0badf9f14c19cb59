// The error that nearly every emulated product has, one relative-gaussian of |y| alone, on whole tiles in AVX-512:
// drawn, added, measured and stored without leaving the registers. Equal to miss_tile and measure_tile of perturb.h.
#pragma once

#include "draws.h"
#include "measure_avx512.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// Values as T holds them, in fp32. For bf16 the lower halves are still there: `keep` clears them, store32 leaves them.
template <class T>
AQN_HD __m512i rounded16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  if (sizeof(T) == 4) return u;
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));  // a tie goes to even
  const __m512i up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, odd, u, _mm512_set1_epi32(0x8000));
}
template <class T>
AQN_HD __m512i keep(__m512i rounded) {
  return sizeof(T) == 4 ? rounded : _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)));
}
// NaNs, of which rounding may have made something else, stay NaNs.
template <class T>
AQN_HD __m512i with_nan(__m512i rounded, __m512 x) {
  if (sizeof(T) == 4) return rounded;
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, _mm512_castps_si512(x), _mm512_set1_epi32(0x00400000));
}

AQN_HD void store32(float* p, __m512i low, __m512i high) {
  _mm512_storeu_si512(p, low);
  _mm512_storeu_si512(p + 16, high);
}
AQN_HD void store32(bf16* p, __m512i low, __m512i high) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(low, odd, high));
}

constexpr int kNotFinite = 0x99;  // fpclass: quiet NaN, both infinities, signalling NaN

// y + (sigma z) |y|. What is not finite in y is not finite in the sum, and comes back as it was.
AQN_HD __m512 relative16(__m512 y, __m512 z, __m512 sigma) { return y + (sigma * z) * _mm512_abs_ps(y); }

// What the tiles of a line add up to. Squares are added in fp32, eight a lane, and then in fp64.
struct Measured {
  __m512 error2 = _mm512_setzero_ps(), reference2 = _mm512_setzero_ps(), injected2 = _mm512_setzero_ps();
  int changed = 0, injected_n = 0;
};

template <class In, class Out>
AQN_HD void measure16(__m512 y, __m512 after, __m512i held, Measured& m) {
  const __m512i was = sizeof(In) == 2 || sizeof(Out) == 4 ? _mm512_castps_si512(y) : keep<Out>(rounded16<Out>(y));
  const __m512i is = keep<Out>(held);
  const __mmask16 some = _mm512_test_epi32_mask(_mm512_castps_si512(y), _mm512_set1_epi32(kAbsMask));
  const __m512 near = _mm512_maskz_rcp14_ps(some, y), one = _mm512_set1_ps(1.0f);
  const __m512 share = (after - y) * _mm512_fmadd_ps(near, _mm512_fnmadd_ps(y, near, one), near);
  const __m512 error = _mm512_castsi512_ps(is) - _mm512_castsi512_ps(was);
  m.error2 = _mm512_fmadd_ps(error, error, m.error2);
  m.reference2 = _mm512_fmadd_ps(y, y, m.reference2);
  m.injected2 = _mm512_fmadd_ps(share, share, m.injected2);
  m.changed += __builtin_popcount(_mm512_cmpneq_epi32_mask(is, was));
  m.injected_n += __builtin_popcount(some);
}

// A whole tile. False where it holds what takes another way to measure: nothing was stored then.
template <class In, class Out, bool Measure>
AQN_HD bool relative_tile(float share, const PhiloxRow& row, int64_t column, const In* y, Out* out, Sums& sums) {
  Words w[kWords];
  philox_words<kWords>(w, static_cast<uint32_t>(column / 4), row);
  const __m512 sigma = _mm512_set1_ps(share);
  Measured measured;
  __m512i held[Measure ? 2 * kWords : 1];
  __m512 z0[kWords], z1[kWords];
  box_muller<kWords>(w, z0, z1);
  for (int i = 0; i < kWords; ++i) {
    const __m512 y0 = load16(y + 32 * i), y1 = load16(y + 32 * i + 16);
    __m512 after0 = relative16(y0, _mm512_unpacklo_ps(z0[i], z1[i]), sigma);
    __m512 after1 = relative16(y1, _mm512_unpackhi_ps(z0[i], z1[i]), sigma);
    __m512i held0 = rounded16<Out>(after0), held1 = rounded16<Out>(after1);
    if (Measure) {
      measure16<In, Out>(y0, after0, held0, measured);
      measure16<In, Out>(y1, after1, held1, measured);
      held[2 * i] = held0;
      held[2 * i + 1] = held1;
      continue;
    }
    if (_mm512_fpclass_ps_mask(after0, kNotFinite) | _mm512_fpclass_ps_mask(after1, kNotFinite)) {
      after0 = _mm512_mask_blend_ps(_mm512_fpclass_ps_mask(y0, kNotFinite), after0, y0);
      after1 = _mm512_mask_blend_ps(_mm512_fpclass_ps_mask(y1, kNotFinite), after1, y1);
      held0 = with_nan<Out>(rounded16<Out>(after0), after0);
      held1 = with_nan<Out>(rounded16<Out>(after1), after1);
    }
    store32(out + 32 * i, held0, held1);
  }
  if (!Measure) return true;
  const bool none = measured.injected_n == 0;
  if (!is_sound(measured.error2, measured.changed == 0) || !is_sound(measured.reference2, none) ||
      !is_sound(measured.injected2, true))
    return false;
  for (int i = 0; i < kWords; ++i) store32(out + 32 * i, held[2 * i], held[2 * i + 1]);
  add16(sums.error2, measured.error2);
  add16(sums.reference2, measured.reference2);
  add16(sums.injected2, measured.injected2);
  sums.changed[0] += measured.changed;
  sums.injected_n[0] += measured.injected_n;
  return true;
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
