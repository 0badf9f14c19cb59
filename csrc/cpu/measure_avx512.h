// What receipts measure, on whole tiles in AVX-512. Squares are added in fp32, eight a lane, and then in fp64; a tile
// for which fp32 has not the range takes the loop that has.
#pragma once

#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kMeasured = 128;  // values of a tile

AQN_HD __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
AQN_HD __m512 load16(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Whether a sum of squares in fp32 is as good as one in fp64: no square, and no value, was infinite or NaN, and what
// vanished below fp32's range is nothing beside what did not. `none`: it is a sum of nothing but zeros.
AQN_HD bool is_sound(__m512 sum2, bool none) {
  const __mmask16 bounded = _mm512_cmp_ps_mask(sum2, _mm512_set1_ps(kFloatMax), _CMP_LE_OQ);
  const __mmask16 ample = _mm512_cmp_ps_mask(sum2, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ);
  return bounded == 0xffff && (none || ample != 0);
}

AQN_HD void add16(double* to, __m512 x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(to, _mm512_loadu_pd(to) + low);
  _mm512_storeu_pd(to + 8, _mm512_loadu_pd(to + 8) + high);
}

// measure_cast() of a tile: x in, y stored, and the factors that brought x to the element format, whose largest and
// least numbers are `highest` and `lowest`. False where nothing was added, as the tile takes the other loop.
template <class T>
AQN_HD bool measure_cast_tile(const T* x, const T* y, const float* to_element, float highest, float lowest,
                              Sums& sums) {
  const __m512 high = _mm512_set1_ps(highest), low = _mm512_set1_ps(lowest);
  __m512 error2 = _mm512_setzero_ps(), reference2 = _mm512_setzero_ps();
  int changed = 0, saturated = 0;
  for (int i = 0; i < kMeasured; i += 16) {
    const __m512 from = load16(x + i), to = load16(y + i), scaled = from * load16(to_element + i), e = to - from;
    error2 = _mm512_fmadd_ps(e, e, error2);
    reference2 = _mm512_fmadd_ps(from, from, reference2);
    changed += __builtin_popcount(_mm512_cmpneq_epi32_mask(_mm512_castps_si512(to), _mm512_castps_si512(from)));
    saturated +=
        __builtin_popcount(_mm512_cmp_ps_mask(scaled, high, _CMP_GT_OQ) | _mm512_cmp_ps_mask(scaled, low, _CMP_LT_OQ));
  }
  if (!is_sound(error2, changed == 0) || !is_sound(reference2, false)) return false;
  add16(sums.error2, error2);
  add16(sums.reference2, reference2);
  sums.changed[0] += changed;
  sums.saturated[0] += saturated;
  return true;
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
