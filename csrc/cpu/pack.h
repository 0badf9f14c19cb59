// From values to packed codes and stored scales in one pass, and back.
#pragma once

#include <cstring>
#include <numeric>

#include "../core/codes.h"
#include "cast_shared.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kPiece = 512;  // values at a time: what a piece needs stays in the nearest cache

// ---- codes that share bytes ----------------------------------------------------------------------------------------

// Bytes of n codes of so many bits along a row; what the last bytes lack is zeros.
AQN_HD int64_t packed_bytes(int64_t n, int bits) {
  if (bits == 2) return (n + 3) / 4;
  if (bits == 4) return (n + 1) / 2;
  if (bits == 6) return (n + 3) / 4 * 3;
  return n * (bits <= 8 ? 1 : bits <= 16 ? 2 : 4);
}

// How many codes must stand before a code that begins a byte.
AQN_HD int codes_a_byte(int bits) { return bits == 2 || bits == 6 ? 4 : bits == 4 ? 2 : 1; }

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));

// 16 codes of 6 bits in 12 bytes; 16 are written.
AQN_HD void pack_16_sixes(uint8_t* to, const uint8_t* codes) {
  Words4 w;
  std::memcpy(&w, codes, 16);
  w = (w & 0x3fu) | (w >> 2 & 0xfc0u) | (w >> 4 & 0x3f000u) | (w >> 6 & 0xfc0000u);
  const Bytes16 order = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15};
  const Bytes16 packed = __builtin_shuffle(reinterpret_cast<Bytes16>(w), order);
  std::memcpy(to, &packed, 16);
}

// The inverse; 16 bytes are read.
AQN_HD void unpack_16_sixes(uint8_t* codes, const uint8_t* from) {
  Bytes16 packed;
  std::memcpy(&packed, from, 16);
  const Bytes16 order = {0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11};
  Words4 w = reinterpret_cast<Words4>(__builtin_shuffle(packed, order));
  w = (w & 0x3fu) | (w << 2 & 0x3f00u) | (w << 4 & 0x3f0000u) | (w << 6 & 0x3f000000u);
  std::memcpy(codes, &w, 16);
}

// `codes` has room for 16 more, and those after the n-th are zeros up to the next byte; so has `to`.
AQN_HD void pack_bytes(uint8_t* to, const uint8_t* codes, int n, int bits) {
  if (bits == 4) {
#pragma omp simd
    for (int i = 0; i < (n + 1) / 2; ++i) {
      uint16_t two;
      std::memcpy(&two, codes + 2 * i, 2);
      to[i] = static_cast<uint8_t>(two | two >> 4);
    }
  } else if (bits == 6) {
    for (int i = 0; i < n; i += 16) pack_16_sixes(to + i / 4 * 3, codes + i);
  } else if (bits == 2) {
#pragma omp simd
    for (int i = 0; i < (n + 3) / 4; ++i) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * i, 4);
      to[i] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
    }
  } else {
    std::memcpy(to, codes, n);
  }
}

// Whole bytes' worth of codes: `codes` has room for 16 more, and 16 bytes of `from` may be read at any code of 6 bits.
AQN_HD void unpack_bytes(uint8_t* codes, const uint8_t* from, int n, int bits) {
  if (bits == 4) {
#pragma omp simd
    for (int i = 0; i < (n + 1) / 2; ++i) {
      const uint16_t two = static_cast<uint16_t>((from[i] & 15u) | (from[i] & 0xf0u) << 4);
      std::memcpy(codes + 2 * i, &two, 2);
    }
  } else if (bits == 6) {
    for (int i = 0; i < n; i += 16) unpack_16_sixes(codes + i, from + i / 4 * 3);
  } else if (bits == 2) {
#pragma omp simd
    for (int i = 0; i < (n + 3) / 4; ++i) {
      const uint32_t b = from[i], four = (b & 3u) | (b & 12u) << 6 | (b & 48u) << 12 | (b & 192u) << 18;
      std::memcpy(codes + 4 * i, &four, 4);
    }
  } else {
    std::memcpy(codes, from, n);
  }
}

// Past the caches: what is written here is not read again soon, and need not be read before it is written.
AQN_HD void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  constexpr int64_t kWide = 64;
#elif defined(__AVX__)
  constexpr int64_t kWide = 32;
#else
  constexpr int64_t kWide = 16;
#endif
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  const int64_t head = std::min(bytes, -reinterpret_cast<intptr_t>(t) & (kWide - 1));
  std::memcpy(t, f, head);
  int64_t i = head;
  for (; i + kWide <= bytes; i += kWide) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(t + i), _mm512_loadu_si512(f + i));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(t + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(f + i)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(t + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + i)));
#endif
  }
  std::memcpy(t + i, f + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// ---- values to codes -----------------------------------------------------------------------------------------------

template <class T>
AQN_HD uint32_t largest_of(const T* x, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    uint16_t m = 0;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; ++i) m = std::max(m, static_cast<uint16_t>(x[i].bits & 0x7fffu));
    return static_cast<uint32_t>(m) << 16;
  } else {
    uint32_t m = 0;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; ++i) m = std::max(m, bits_of(x[i]) & kAbsMask);
    return m;
  }
}

// A scale as it is stored: an E8M0 byte, an E4M3 byte or fp32.
struct StoredScales {
  ScaleCode kind;
  void* at;

  AQN_HD void store(int64_t i, float s) const {
    if (kind == ScaleCode::kE8m0) {
      static_cast<uint8_t*>(at)[i] = e8m0(s);
    } else if (kind == ScaleCode::kE4m3) {
      static_cast<uint8_t*>(at)[i] = e4m3(s);
    } else if (kind == ScaleCode::kFloat) {
      static_cast<float*>(at)[i] = s;
    }
  }

  static AQN_HD uint8_t e8m0(float s) { return static_cast<uint8_t>(is_nan(s) ? 255u : (bits_of(s) >> 23) & 255u); }
  // Scales are not negative; below 2^-6, eighths of it.
  static AQN_HD uint8_t e4m3(float s) {
    const uint32_t u = bits_of(s) & kAbsMask, small = static_cast<uint32_t>(static_cast<int32_t>(abs_of(s) * 512.0f));
    return static_cast<uint8_t>(u > kInfBits ? 0x7fu : (u < bits_of(0x1p-6f) ? small : (u >> 20) - (120u << 3)));
  }
};

template <class Encoder, class T>
AQN_HD void encode_all(uint8_t* codes, const T* x, int n, const Encoder encode, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(encode(load(x[i]) * factor));
}

template <class Encoder, class T>
AQN_HD void encode_all_divided(uint8_t* codes, const T* x, int n, const Encoder encode, const float divisor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(encode(load(x[i]) / divisor));
}

template <class T>
int64_t count_nans(const T* x, int64_t n, float factor, bool divides) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += is_nan(divides ? load(x[i]) / factor : load(x[i]) * factor) ? 1 : 0;
  return count;
}

// One run of values under one scale, a piece at a time; `to` begins at a whole byte.
template <class Encoder, class T>
void pack_run(uint8_t* to, const T* x, int64_t n, const Encoder& encode, float factor, bool divides, int bits) {
  uint8_t codes[kPiece + 16], packed[kPiece + 16];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int length = static_cast<int>(std::min<int64_t>(kPiece, n - i));
    if (divides)
      encode_all_divided(codes, x + i, length, encode, factor);
    else
      encode_all(codes, x + i, length, encode, factor);
    std::fill_n(codes + length, 16, 0);
    pack_bytes(packed, codes, length, bits);
    std::memcpy(to + packed_bytes(i, bits), packed, packed_bytes(length, bits));
  }
}

struct PackConstants : CastConstants {
  int bits;
  bool divides, loses_nan, tensor_says_nan;

  explicit PackConstants(const PackArgs& a)
      : CastConstants(a.cast),
        bits(a.codes.bits),
        divides(a.cast.scaling.divides()),
        loses_nan(a.codes.nan < 0 && is_nan(a.cast.element.nan)),
        tensor_says_nan(!is_finite(tensor.decode)) {}

  // NaNs of a run that neither a code nor the scale will tell of.
  template <class T>
  int64_t lost(const T* x, int64_t n, uint32_t amax, const BlockScale& b) const {
    if (!loses_nan || amax < kInfBits || !is_finite(b.decode) || tensor_says_nan) return 0;
    return count_nans(x, n, b.to_element, divides);
  }
};

// Every element for itself, or under one scale for all.
template <class Encoder, class T>
int64_t pack_elements(const PackArgs& a, const Encoder& encode) {
  const PackConstants k(a);
  const CastArgs& c = a.cast;
  BlockScale b = {1.0f, 1.0f, 1.0f};
  if (c.scaling.rule != Scale::kNone) b = fp32_scale(c.scaling, c.tensor_amax);
  if (c.scaling.rule != Scale::kNone) static_cast<float*>(c.scales)[0] = b.s;
  const int64_t rows = c.high, columns = c.wide, bytes = packed_bytes(columns, k.bits);
  constexpr int64_t kRun = 16384;
  const int64_t runs = (columns + kRun - 1) / kRun, all = rows * runs;
  const int64_t per_chunk = std::max<int64_t>(1, kRun / std::max<int64_t>(columns, 1)),
                chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<int64_t> lost(k.loses_nan ? chunks : 0, 0);
  for_chunks(chunks, c.threads, [&](int64_t chunk) {
    for (int64_t i = chunk * per_chunk; i < std::min(all, (chunk + 1) * per_chunk); ++i) {
      const int64_t row = i / runs, start = i % runs * kRun, n = std::min(kRun, columns - start);
      const T* x = static_cast<const T*>(c.x) + row * columns + start;
      if (k.loses_nan) lost[chunk] += k.lost(x, n, largest_of(x, n), b);
      pack_run(static_cast<uint8_t*>(c.y) + row * bytes + packed_bytes(start, k.bits), x, n, encode, b.to_element,
               k.divides, k.bits);
    }
  });
  return std::accumulate(lost.begin(), lost.end(), int64_t{0});
}

// Blocks of any length along rows.
template <class Encoder, class T>
int64_t pack_blocks(const PackArgs& a, const Encoder& encode) {
  const PackConstants k(a);
  const CastArgs& c = a.cast;
  const StoredScales scales = {a.scale_code, c.scales};
  const int64_t rows = c.high, columns = c.wide, bytes = packed_bytes(columns, k.bits);
  const int64_t block = c.scaling.columns ? c.scaling.columns : columns, blocks = (columns + block - 1) / block;
  const int64_t all = rows * blocks, per_chunk = std::max<int64_t>(1, 16384 / block),
                chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<int64_t> lost(k.loses_nan ? chunks : 0, 0);
  for_chunks(chunks, c.threads, [&](int64_t chunk) {
    for (int64_t i = chunk * per_chunk; i < std::min(all, (chunk + 1) * per_chunk); ++i) {
      const int64_t row = i / blocks, start = i % blocks * block, n = std::min(block, columns - start);
      const T* x = static_cast<const T*>(c.x) + row * columns + start;
      const uint32_t amax = largest_of(x, n);
      const BlockScale b = k.block_scale(amax);
      scales.store(i, b.s);
      if (k.loses_nan) lost[chunk] += k.lost(x, n, amax, b);
      pack_run(static_cast<uint8_t*>(c.y) + row * bytes + packed_bytes(start, k.bits), x, n, encode, b.to_element,
               k.divides, k.bits);
    }
  });
  return std::accumulate(lost.begin(), lost.end(), int64_t{0});
}

// Whole blocks of N that follow each other, so many at a time that their scales are computed in lanes.
template <class Encoder, class T, int N>
int64_t pack_whole_blocks(const PackArgs& a, const Encoder& encode) {
  constexpr int kBatch = 16, kSize = kBatch * N;
  const PackConstants k(a);
  const CastArgs& c = a.cast;
  const int64_t all = c.high * (c.wide / N), per_chunk = 16384 / N, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<int64_t> lost(k.loses_nan ? chunks : 0, 0);
  for_chunks(chunks, c.threads, [&](int64_t chunk) {
    const int64_t first = chunk * per_chunk, last = std::min(all, first + per_chunk);
    uint8_t codes[kSize + 16], packed[kSize + 16];
    std::fill_n(codes + kSize, 16, 0);
    for (int64_t i = first; i < last; i += kBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kBatch, last - i));
      float factor[kBatch], decoded[kBatch], s[kBatch];
      uint32_t amax[kBatch] = {};
      const T* x = static_cast<const T*>(c.x) + i * N;
      for (int b = 0; b < batch; ++b) amax[b] = largest_of(x + b * N, N);
      k.block_scales(factor, decoded, s, amax, kBatch);
      if (a.scale_code == ScaleCode::kE8m0) {
        for (int b = 0; b < batch; ++b) static_cast<uint8_t*>(c.scales)[i + b] = StoredScales::e8m0(s[b]);
      } else {
        for (int b = 0; b < batch; ++b) static_cast<uint8_t*>(c.scales)[i + b] = StoredScales::e4m3(s[b]);
      }
      for (int b = 0; b < batch; ++b) {
        encode_all(codes + b * N, x + b * N, N, encode, factor[b]);
        if (k.loses_nan && amax[b] >= kInfBits) lost[chunk] += k.lost(x + b * N, N, amax[b], {factor[b], s[b], s[b]});
      }
      pack_bytes(packed, codes, batch * N, k.bits);
      std::memcpy(static_cast<uint8_t*>(c.y) + packed_bytes(i * N, k.bits), packed, packed_bytes(batch * N, k.bits));
    }
  });
  return std::accumulate(lost.begin(), lost.end(), int64_t{0});
}

template <class T>
int64_t pack_hif4(const PackArgs& a) {
  const CastArgs& c = a.cast;
  const int64_t columns = c.wide, bytes = packed_bytes(columns, 4), blocks = (columns + 63) / 64, all = c.high * blocks;
  for_chunks((all + 255) / 256, c.threads, [&](int64_t chunk) {
    float x[64], factor[64];
    uint8_t codes[64 + 16] = {}, packed[64 + 16];
    for (int64_t i = chunk * 256; i < std::min(all, (chunk + 1) * 256); ++i) {
      const int64_t row = i / blocks, start = i % blocks * 64;
      const int n = static_cast<int>(std::min<int64_t>(64, columns - start));
      std::fill_n(x, 64, 0.0f);
      load_all(x, static_cast<const T*>(c.x) + row * columns + start, n);
      uint32_t of4[16];
      for (int g = 0; g < 16; ++g) of4[g] = largest_bits(x + 4 * g, 4);
      const Hif4 h = hif4_scales(of4);
      static_cast<uint32_t*>(c.scales)[i] = h.levels;
      for (int j = 0; j < 64; ++j) factor[j] = exp2_of(-h.shift(j / 4));
      const float inverse = h.inverse;
      const uint32_t all_ones = h.finite ? 15u : 0u;
#pragma omp simd
      for (int j = 0; j < 64; ++j) {
        const float m = to_bf16((abs_of(x[j]) * inverse) * factor[j]);
        const int32_t quarters = static_cast<int32_t>(at_most(m * 4.0f, 7.0f) + 0.5f);  // ties away from zero
        codes[j] = static_cast<uint8_t>((static_cast<uint32_t>(quarters) | (x[j] < 0.0f ? 8u : 0u)) & all_ones);
      }
      pack_bytes(packed, codes, n, 4);
      std::memcpy(static_cast<uint8_t*>(c.y) + row * bytes + start / 2, packed, packed_bytes(n, 4));
    }
  });
  return 0;  // a NaN makes the block's scale NaN
}

template <class Encoder, class T>
int64_t pack_typed(const PackArgs& a, const Encoder& encode) {
  const Scaling& s = a.cast.scaling;
  if (s.rule == Scale::kNone || s.rows == 0) return pack_elements<Encoder, T>(a, encode);
  if (s.rule == Scale::kPowerOfTwo || s.rule == Scale::kTwoLevel) {
    if (s.columns == 32 && a.cast.wide % 32 == 0) return pack_whole_blocks<Encoder, T, 32>(a, encode);
    if (s.columns == 16 && a.cast.wide % 16 == 0) return pack_whole_blocks<Encoder, T, 16>(a, encode);
  }
  return pack_blocks<Encoder, T>(a, encode);
}

template <class T>
int64_t pack_as(const PackArgs& a) {
  if (a.cast.scaling.rule == Scale::kHif4) return pack_hif4<T>(a);
  if (a.codes.spelling == Spelling::kInteger) return pack_typed<IntegerEncoder, T>(a, {a.cast.element, a.codes});
  if (a.codes.spelling == Spelling::kHif8) return pack_typed<Hif8Encoder, T>(a, {a.cast.element, a.codes});
  return pack_typed<PlainEncoder, T>(a, {a.cast.element, a.codes});
}

int64_t pack(const PackArgs& a) {
  if (a.cast.high == 0 || a.cast.wide == 0) {
    if (a.cast.scaling.rule != Scale::kNone && a.cast.scaling.rows == 0)
      static_cast<float*>(a.cast.scales)[0] = fp32_scale(a.cast.scaling, 0.0f).s;
    return 0;
  }
  return a.cast.dtype == Dtype::kFloat32 ? pack_as<float>(a) : pack_as<bf16>(a);
}

// Values that the format holds, in rows; returns how many are NaNs without a code.
int64_t encode(const EncodeArgs& a) {
  const Codes k = a.codes;
  const int64_t bytes = packed_bytes(a.columns, k.bits);
  constexpr int64_t kRun = 4096;
  const int64_t runs = (a.columns + kRun - 1) / kRun, all = a.rows * runs;
  const int64_t per_chunk = std::max<int64_t>(1, kRun / std::max<int64_t>(a.columns, 1)),
                chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<int64_t> lost(chunks, 0);
  for_chunks(chunks, a.threads, [&](int64_t chunk) {
    uint32_t words[kRun];
    uint8_t codes[kRun + 16], packed[kRun + 16];
    for (int64_t i = chunk * per_chunk; i < std::min(all, (chunk + 1) * per_chunk); ++i) {
      const int64_t row = i / runs, start = i % runs * kRun;
      const int n = static_cast<int>(std::min(kRun, a.columns - start));
      const float* x = a.x + row * a.columns + start;
      uint8_t* to = static_cast<uint8_t*>(a.y) + row * bytes + packed_bytes(start, k.bits);
      for (int j = 0; j < n; ++j) words[j] = code_of(k, x[j]);
      if (k.nan < 0) lost[chunk] += count_nans(x, n, 1.0f, false);
      if (k.bits > 16) {
        std::memcpy(to, words, 4 * n);
      } else if (k.bits > 8) {
        for (int j = 0; j < n; ++j) reinterpret_cast<uint16_t*>(to)[j] = static_cast<uint16_t>(words[j]);
      } else {
        for (int j = 0; j < n; ++j) codes[j] = static_cast<uint8_t>(words[j]);
        std::fill_n(codes + n, 16, 0);
        pack_bytes(packed, codes, n, k.bits);
        std::memcpy(to, packed, packed_bytes(n, k.bits));
      }
    }
  });
  return std::accumulate(lost.begin(), lost.end(), int64_t{0});
}

// ---- codes to values -----------------------------------------------------------------------------------------------

// Codes of more than 8 bits.
template <class Code>
void decode_wide(float* y, const Code* codes, int n, const Codes& k) {
  for (int i = 0; i < n; ++i) y[i] = value_of(k, static_cast<uint32_t>(codes[i]));
}

// Values of codes of at most 8 bits, which bfloat16 holds: a table, in registers where they are wide enough.
class Table {
 public:
  explicit Table(const Codes& k) : bits_(k.bits) {
    for (uint32_t c = 0; c < 256; ++c)
      at_[c] = static_cast<uint16_t>(bits_of(value_of(k, c & ((1u << bits_) - 1u))) >> 16);
  }

  // `codes` and `values` have room for 32 more.
  void look_up(uint16_t* values, const uint8_t* codes, int n) const {
#if defined(__AVX512BW__)
    if (bits_ <= 5)
      permute<1>(values, codes, n);
    else if (bits_ == 6)
      permute<2>(values, codes, n);
    else
      permute<8>(values, codes, n);
#else
    for (int i = 0; i < n; ++i) values[i] = at_[codes[i]];
#endif
  }

 private:
#if defined(__AVX512BW__)
  template <int Registers>
  AQN_HD void permute(uint16_t* values, const uint8_t* codes, int n) const {
    __m512i t[Registers];
    for (int r = 0; r < Registers; ++r) t[r] = _mm512_loadu_si512(at_ + 32 * r);
    for (int i = 0; i < n; i += 32) {
      const __m512i c = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
      __m512i v;
      if constexpr (Registers == 1) {
        v = _mm512_permutexvar_epi16(c, t[0]);
      } else {
        v = _mm512_permutex2var_epi16(t[0], c, t[1]);
      }
      if constexpr (Registers == 8) {
        const __mmask32 second = _mm512_test_epi16_mask(c, _mm512_set1_epi16(64));
        const __mmask32 upper = _mm512_test_epi16_mask(c, _mm512_set1_epi16(128));
        v = _mm512_mask_blend_epi16(second, v, _mm512_permutex2var_epi16(t[2], c, t[3]));
        __m512i w = _mm512_permutex2var_epi16(t[4], c, t[5]);
        w = _mm512_mask_blend_epi16(second, w, _mm512_permutex2var_epi16(t[6], c, t[7]));
        v = _mm512_mask_blend_epi16(upper, v, w);
      }
      _mm512_storeu_si512(values + i, v);
    }
  }
#endif

  int bits_;
  uint16_t at_[256];
};

// What a block's stored scale stands for: the first factor after decoding.
struct ScaleReader {
  ScaleCode kind;
  ScaleUse use;
  const void* at;
  float tensor_scale;
  Codes e4m3, ue6m2;

  explicit ScaleReader(const UnpackArgs& a)
      : kind(a.scale_code),
        use(a.scale_use),
        at(a.scales),
        tensor_scale(a.tensor_scale),
        e4m3{Spelling::kFloat, 8, 3, -6, true, true, true, -1, 127},
        ue6m2{Spelling::kFloat, 8, 2, -48, false, false, false, -1, 255} {}

  AQN_HD float operator()(int64_t i) const {
    const float s = stored(i);
    if (use == ScaleUse::kTimesTensor) return s * tensor_scale;
    return use == ScaleUse::kOverTensor ? s / tensor_scale : s;
  }
  AQN_HD float after() const { return use == ScaleUse::kTensorAfter ? tensor_scale : 1.0f; }

  AQN_HD float of_hif4(int64_t i, int64_t group) const {
    const uint32_t levels = static_cast<const uint32_t*>(at)[i];
    const uint32_t bits = ((levels >> (8 + group / 2)) & 1u) + ((levels >> (16 + group)) & 1u);
    return exp2_of(static_cast<int>(bits)) * value_of(ue6m2, levels & 255u);
  }

 private:
  AQN_HD float stored(int64_t i) const {
    if (kind == ScaleCode::kE8m0) {
      const uint32_t code = static_cast<const uint8_t*>(at)[i];
      return float_of(code == 255u ? kNanBits : (code ? code << 23 : 0x00400000u));
    }
    if (kind == ScaleCode::kE4m3) return value_of(e4m3, static_cast<const uint8_t*>(at)[i]);
    return kind == ScaleCode::kFloat ? static_cast<const float*>(at)[i] : 1.0f;
  }
};

// Where the scales of a row begin: blocks along the row itself are `run` long.
AQN_HD int64_t first_scale(const UnpackArgs& a, int64_t row) {
  const int64_t inner = row % a.inner, along = row / a.inner % a.along, outer = row / a.inner / a.along;
  const int64_t high = (a.along + a.per_block - 1) / a.per_block, wide = (a.columns + a.run - 1) / a.run;
  return ((outer * high + along / a.per_block) * a.inner + inner) * wide;
}

// One factor for each of n values of a row, from `start` on.
AQN_HD void row_factors(float* factor, const ScaleReader& read, const UnpackArgs& a, int64_t row, int64_t start,
                        int n) {
  const int64_t first = first_scale(a, row), along = row / a.inner % a.along;
  const bool hif4 = a.scale_code == ScaleCode::kHif4;
  for (int i = 0; i < n;) {
    const int64_t at = start + i, block = at / a.run,
                  length = hif4 ? (a.run == 1 ? 1 : 4 - at % 4) : (block + 1) * a.run - at;
    const float f = hif4 ? read.of_hif4(first + block, (a.run == 1 ? along : at) % 64 / 4) : read(first + block);
    for (const int64_t end = std::min<int64_t>(n, i + length); i < end; ++i) factor[i] = f;
  }
}

// values * factor, then * after, of values in bfloat16.
AQN_HD void scale_run(float* y, const uint16_t* values, int n, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = float_of(static_cast<uint32_t>(values[i]) << 16) * factor;
}
AQN_HD void scale_run(float* y, const uint16_t* values, int n, const float factor, const float after) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = (float_of(static_cast<uint32_t>(values[i]) << 16) * factor) * after;
}
AQN_HD void scale_run(bf16* y, const uint16_t* values, int n, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) store(y + i, float_of(static_cast<uint32_t>(values[i]) << 16) * factor);
}
AQN_HD void scale_run(bf16* y, const uint16_t* values, int n, const float factor, const float after) {
#pragma omp simd
  for (int i = 0; i < n; ++i) store(y + i, (float_of(static_cast<uint32_t>(values[i]) << 16) * factor) * after);
}

// By a power of two that brings no number out of the normal ones: its exponent is added.
AQN_HD void shift_run(bf16* y, const uint16_t* values, int n, const uint16_t exponent) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint16_t magnitude = values[i] & 0x7fffu;
    const uint16_t added = static_cast<uint16_t>(magnitude - 1u) < 0x7f7fu ? exponent : uint16_t{0};
    y[i].bits = static_cast<uint16_t>(values[i] + added);
  }
}
AQN_HD void shift_run(float*, const uint16_t*, int, uint16_t) {}

// The lowest and the highest exponent of E8M0 that shift_run may add: no value of 8 bits is beyond 2^(+-64).
constexpr int kShiftFrom = 127 - 62, kShiftTo = 127 + 62;

template <class T>
class Unpacker {
 public:
  explicit Unpacker(const UnpackArgs& a)
      : a_(a),
        read_(a),
        table_(a.codes),
        after_(read_.after()),
        shifts_(sizeof(T) == 2 && a.scale_code == ScaleCode::kE8m0 && small_range(a.codes)) {}

  // n values of a row, from `start` on.
  void run(T* to, int64_t row, int64_t start, int n) const {
    const int bits = a_.codes.bits;
    const uint8_t* from =
        static_cast<const uint8_t*>(a_.from) + row * packed_bytes(a_.columns, bits) + packed_bytes(start, bits);
    if (bits > 8) return wide(to, from, row, start, n);
    uint8_t codes[kPiece + 32], held[kPiece + 32];
    uint16_t values[kPiece + 32];
    if (bits == 6) {
      std::memcpy(held, from, packed_bytes(n, 6));
      from = held;
    }
    unpack_bytes(codes, from, n, bits);
    table_.look_up(values, codes, n);
    if (a_.scale_code == ScaleCode::kNone) {
      scale_run(to, values, n, 1.0f);
    } else if (a_.run >= 16 && a_.scale_code != ScaleCode::kHif4) {
      runs(to, values, row, start, n);
    } else {
      float factor[kPiece];
      row_factors(factor, read_, a_, row, start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i)
        store(to + i, (float_of(static_cast<uint32_t>(values[i]) << 16) * factor[i]) * after_);
    }
  }

 private:
  static bool small_range(const Codes& k) {
    for (uint32_t c = 0; c < (1u << k.bits) && k.bits <= 8; ++c) {
      const float v = abs_of(value_of(k, c));
      if (v != 0.0f && is_finite(v) && (v < 0x1p-62f || v > 0x1p62f)) return false;
    }
    return true;
  }

  // One scale for many values.
  void runs(T* to, const uint16_t* values, int64_t row, int64_t start, int n) const {
    const int64_t first = first_scale(a_, row);
    for (int i = 0; i < n;) {
      const int64_t block = (start + i) / a_.run;
      const int length = static_cast<int>(std::min<int64_t>(n, (block + 1) * a_.run - start)) - i;
      const int e8m0 = shifts_ ? static_cast<const uint8_t*>(a_.scales)[first + block] : 0;
      if (e8m0 >= kShiftFrom && e8m0 <= kShiftTo)
        shift_run(to + i, values + i, length, static_cast<uint16_t>((e8m0 - 127) * 128));
      else if (a_.scale_use == ScaleUse::kTensorAfter)
        scale_run(to + i, values + i, length, read_(first + block), after_);
      else
        scale_run(to + i, values + i, length, read_(first + block));
      i += length;
    }
  }

  void wide(T* to, const uint8_t* from, int64_t row, int64_t start, int n) const {
    float y[kPiece], factor[kPiece];
    if (a_.codes.bits > 16)
      decode_wide(y, reinterpret_cast<const int32_t*>(from), n, a_.codes);
    else
      decode_wide(y, reinterpret_cast<const uint16_t*>(from), n, a_.codes);
    std::fill_n(factor, n, 1.0f);
    if (a_.scale_code != ScaleCode::kNone) row_factors(factor, read_, a_, row, start, n);
    for (int i = 0; i < n; ++i) store(to + i, (y[i] * factor[i]) * after_);
  }

  const UnpackArgs a_;
  ScaleReader read_;
  Table table_;
  float after_;
  bool shifts_;
};

template <class T>
void unpack_typed(const UnpackArgs& a) {
  const Unpacker<T> unpacker(a);
  const int64_t runs = (a.columns + kPiece - 1) / kPiece, all = a.rows * runs;
  const int64_t per_chunk = std::max<int64_t>(1, 16384 / std::min<int64_t>(a.columns, kPiece)),
                chunks = (all + per_chunk - 1) / per_chunk;
  for_chunks(chunks, a.threads, [&](int64_t chunk) {
    T out[kPiece];
    for (int64_t i = chunk * per_chunk; i < std::min(all, (chunk + 1) * per_chunk); ++i) {
      const int64_t row = i / runs, start = i % runs * kPiece, n = std::min<int64_t>(kPiece, a.columns - start);
      unpacker.run(out, row, start, static_cast<int>(n));
      stream(static_cast<T*>(a.y) + row * a.columns + start, out, n * static_cast<int64_t>(sizeof(T)));
    }
  });
}

void unpack(const UnpackArgs& a) {
  if (a.rows == 0 || a.columns == 0) return;
  a.dtype == Dtype::kFloat32 ? unpack_typed<float>(a) : unpack_typed<bf16>(a);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
