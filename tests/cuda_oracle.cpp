// NVIDIA's own conversions, on the host: the functions of cuda_fp8.h, cuda_fp6.h and cuda_fp4.h over arrays.
#include <cuda_fp4.h>
#include <cuda_fp6.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

namespace {

float of_half(__half_raw h) {  // exact: every binary16 is a binary32
  const uint32_t sign = static_cast<uint32_t>(h.x & 0x8000u) << 16, field = (h.x >> 10) & 31u, fraction = h.x & 1023u;
  float magnitude;
  if (field == 31) {
    const uint32_t bits = 0x7f800000u | (fraction << 13);
    std::memcpy(&magnitude, &bits, 4);
  } else {
    magnitude = static_cast<float>(field ? fraction + 1024u : fraction);
    for (int e = field ? static_cast<int>(field) - 25 : -24; e < 0; ++e) magnitude *= 0.5f;
    for (int e = field ? static_cast<int>(field) - 25 : 0; e > 0; --e) magnitude *= 2.0f;
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

float of_bfloat16(__nv_bfloat16_raw b) {
  const uint32_t bits = static_cast<uint32_t>(b.x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

extern "C" {

void encode_fp8(uint8_t* out, const float* x, int64_t n, int e5m2, int saturate) {
  const __nv_fp8_interpretation_t kind = e5m2 ? __NV_E5M2 : __NV_E4M3;
  const __nv_saturation_t mode = saturate ? __NV_SATFINITE : __NV_NOSAT;
  for (int64_t i = 0; i < n; ++i) out[i] = __nv_cvt_float_to_fp8(x[i], mode, kind);
}
void decode_fp8(float* out, const uint8_t* codes, int64_t n, int e5m2) {
  for (int64_t i = 0; i < n; ++i) out[i] = of_half(__nv_cvt_fp8_to_halfraw(codes[i], e5m2 ? __NV_E5M2 : __NV_E4M3));
}
void encode_fp6(uint8_t* out, const float* x, int64_t n, int e3m2, int) {
  for (int64_t i = 0; i < n; ++i) out[i] = __nv_cvt_float_to_fp6(x[i], e3m2 ? __NV_E3M2 : __NV_E2M3, cudaRoundNearest);
}
void decode_fp6(float* out, const uint8_t* codes, int64_t n, int e3m2) {
  for (int64_t i = 0; i < n; ++i) out[i] = of_half(__nv_cvt_fp6_to_halfraw(codes[i], e3m2 ? __NV_E3M2 : __NV_E2M3));
}
void encode_fp4(uint8_t* out, const float* x, int64_t n, int, int) {
  for (int64_t i = 0; i < n; ++i) out[i] = __nv_cvt_float_to_fp4(x[i], __NV_E2M1, cudaRoundNearest);
}
void decode_fp4(float* out, const uint8_t* codes, int64_t n, int) {
  for (int64_t i = 0; i < n; ++i) out[i] = of_half(__nv_cvt_fp4_to_halfraw(codes[i], __NV_E2M1));
}
void encode_e8m0(uint8_t* out, const float* x, int64_t n, int up, int saturate) {
  const __nv_saturation_t mode = saturate ? __NV_SATFINITE : __NV_NOSAT;
  for (int64_t i = 0; i < n; ++i) out[i] = __nv_cvt_float_to_e8m0(x[i], mode, up ? cudaRoundPosInf : cudaRoundZero);
}
void decode_e8m0(float* out, const uint8_t* codes, int64_t n, int) {
  for (int64_t i = 0; i < n; ++i) out[i] = of_bfloat16(__nv_cvt_e8m0_to_bf16raw(codes[i]));
}

}  // extern "C"
