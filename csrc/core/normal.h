// Two uniform words -> two standard normals by Box-Muller, in exact operations only.
//
// The logarithm, sine and cosine are polynomials evaluated with + and * in a fixed order, so a numpy array, an AVX-512
// lane and a CUDA thread agree to the last bit. Their errors are below 1.5e-7; the largest value is
// sqrt(2 * 31 * ln 2) = 6.56. Coefficients: Chebyshev fits, rounded to fp32.
#pragma once

#include "bits.h"

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace aqn {

AQN_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// -ln(u) for u = m / 2^31 with the integer m = (word >> 1) | 1, so 0 < u <= 1.
AQN_HD float neg_log_uniform(uint32_t word) {
  const uint32_t u = bits_of(static_cast<float>(static_cast<int32_t>((word >> 1) | 1u)));
  // Split u = 2^e * (1 + x) with 1 + x in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2).
  const int32_t shifted = static_cast<int32_t>(u - 0x3f3504f3u);
  const int32_t e = shifted >> 23;
  const float x = float_of(u - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float q = 0.09272214025259018f;
  q = q * x + -0.1411842554807663f;
  q = q * x + 0.14676396548748016f;
  q = q * x + -0.16592855751514435f;
  q = q * x + 0.19985127449035645f;
  q = q * x + -0.2500092089176178f;
  q = q * x + 0.3333340883255005f;
  const float x2 = x * x;
  const float log1p = (x - 0.5f * x2) + (x2 * x) * q;
  const float exponent = static_cast<float>(31 - e) * 0.6931471805599453f;
  return exponent - log1p;
}

AQN_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
  const float r2 = 2.0f * neg_log_uniform(radius_word);
  const float radius = sqrt_rn(r2 < 0.0f ? 0.0f : r2);
  // The top two bits choose the quadrant; the rest is f in [-1/2, 1/2), the angle in units of pi/2.
  const uint32_t quadrant = angle_word >> 30;
  const float f = static_cast<float>(static_cast<int32_t>(angle_word << 2)) * 0x1p-32f;
  const float g = f * f;
  float s = -0.004602163098752499f;
  s = s * g + 0.07968021929264069f;
  s = s * g + -0.6459634900093079f;
  s = s * g + 1.5707963705062866f;
  s = s * f;
  float c = 0.0009092451655305922f;
  c = c * g + -0.020862624049186707f;
  c = c * g + 0.2536695599555969f;
  c = c * g + -1.2337005138397217f;
  c = c * g + 1.0f;
  const bool odd = (quadrant & 1u) != 0;
  const float a = odd ? s : c;
  const float b = odd ? c : s;
  // cos is negative in quadrants 1 and 2, sin in quadrants 2 and 3.
  const uint32_t flip_cos = ((quadrant + 1u) & 2u) << 30;
  const uint32_t flip_sin = (quadrant & 2u) << 30;
  z0 = radius * float_of(bits_of(a) ^ flip_cos);
  z1 = radius * float_of(bits_of(b) ^ flip_sin);
}

}  // namespace aqn
