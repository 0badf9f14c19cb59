// Random words and normals of one tile of a logical row: columns [column, column + kTile), where column is a multiple
// of 4 so that the tile is made of whole Philox blocks.
#pragma once

#include "../core/normal.h"
#include "../core/philox.h"
#include "common.h"
#if defined(__AVX512F__)
#include "philox_avx512.h"
#endif

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kTile = 128;

#if defined(__AVX512F__)

constexpr int kWords = kTile / 32;

AQN_HD void word_tile(uint32_t* words, int64_t column, uint64_t row, uint64_t key, uint32_t word) {
  Words w[kWords];
  philox_words<kWords>(w, static_cast<uint32_t>(column / 4), PhiloxRow(row, key, word));
  for (int i = 0; i < kWords; ++i) {
    _mm512_storeu_si512(words + 32 * i, _mm512_unpacklo_epi32(w[i].radius, w[i].angle));
    _mm512_storeu_si512(words + 32 * i + 16, _mm512_unpackhi_epi32(w[i].radius, w[i].angle));
  }
}

AQN_HD void normal_tile(float* z, int64_t column, uint64_t row, uint64_t key, uint32_t word) {
  Words w[kWords];
  philox_words<kWords>(w, static_cast<uint32_t>(column / 4), PhiloxRow(row, key, word));
  __m512 z0[kWords], z1[kWords];
  box_muller<kWords>(w, z0, z1);
  for (int i = 0; i < kWords; ++i) {
    _mm512_storeu_ps(z + 32 * i, _mm512_unpacklo_ps(z0[i], z1[i]));
    _mm512_storeu_ps(z + 32 * i + 16, _mm512_unpackhi_ps(z0[i], z1[i]));
  }
}

#else

constexpr int kCounters = kTile / 4;  // Philox blocks

// The random words of columns [column, column + kTile) of one logical row; column is a multiple of 4. Word i of a
// column's Philox block stands in c<i>, for the columns 4 j + i.
AQN_HD void philox_tile(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, int64_t column, uint64_t row,
                        uint64_t key, uint32_t word) {
  const uint32_t first = static_cast<uint32_t>(column / 4);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) {
    c0[j] = first + static_cast<uint32_t>(j);
    c1[j] = static_cast<uint32_t>(row);
    c2[j] = static_cast<uint32_t>(row >> 32);
    c3[j] = word;
    philox4x32_10(c0[j], c1[j], c2[j], c3[j], static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  }
}

// Four streams of kCounters values as one of kTile columns: value j of stream i goes to column 4 j + i.
template <class T>
AQN_HD void interleave(T* out, const T* s0, const T* s1, const T* s2, const T* s3) {
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) {
    out[4 * j] = s0[j];
    out[4 * j + 1] = s1[j];
    out[4 * j + 2] = s2[j];
    out[4 * j + 3] = s3[j];
  }
}

// The random words of the same columns, in their order.
AQN_HD void word_tile(uint32_t* words, int64_t column, uint64_t row, uint64_t key, uint32_t word) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  philox_tile(c0, c1, c2, c3, column, row, key, word);
  interleave(words, c0, c1, c2, c3);
}

// The standard normals of the same columns.
AQN_HD void normal_tile(float* z, int64_t column, uint64_t row, uint64_t key, uint32_t word) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  philox_tile(c0, c1, c2, c3, column, row, key, word);
  float z0[kCounters], z1[kCounters], z2[kCounters], z3[kCounters];
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c0[j], c1[j], z0[j], z1[j]);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c2[j], c3[j], z2[j], z3[j]);
  interleave(z, z0, z1, z2, z3);
}

#endif

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
