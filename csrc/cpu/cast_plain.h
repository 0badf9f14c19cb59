// Casts to formats with plain elements and a scale that depends on the block's largest value alone: what most casts
// run.
#pragma once

#include "cast_shared.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kMaxBlock = 256;  // the longest block that fits the local buffers

// Blocks of any length along rows whose last block may be shorter.
template <class T, bool Measure>
Stats cast_contiguous(const CastArgs& a) {
  const CastConstants k(a);
  const float t = k.decode();
  const int64_t block = a.scaling.columns, blocks = (a.wide + block - 1) / block;
  const int64_t per_chunk = std::max<int64_t>(1, 16384 / block);
  const int64_t all = a.batch * blocks, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    const int64_t last = std::min(all, (c + 1) * per_chunk);
    for (int64_t i = c * per_chunk; i < last; ++i) {
      const int64_t start = (i % blocks) * block, at = (i / blocks) * a.wide + start;
      const int n = static_cast<int>(std::min(block, a.wide - start));
      T* to = static_cast<T*>(a.y) + at;
      float x[kMaxBlock], y[kMaxBlock], scaled[kMaxBlock];
      load_all(x, static_cast<const T*>(a.x) + at, n);
      const BlockScale b = k.block_scale(largest_bits(x, n));
      if (a.scales) static_cast<float*>(a.scales)[i] = b.s;
      cast_all(y, x, n, k.round, b.to_element, k.decode(b), t);
      store_all(to, y, n);
      if (Measure) {
        load_all(y, to, n);
        multiply_all(scaled, x, n, b.to_element);
        measure_cast(x, y, scaled, n, k.element, sums);
      }
      count += n;
    }
    if (Measure) sums.flush(parts[c], count);
  });
  return total(parts);
}

// Whole blocks of N that follow each other: kBatch of them at a time, so that their scales are computed in lanes and no
// block waits for another's maximum.
template <class T, bool Measure, int N>
Stats cast_whole_blocks(const CastArgs& a) {
  constexpr int kBatch = 16, kSize = kBatch * N;
  const CastConstants k(a);
  const float t = k.decode();
  const int64_t all = a.batch * (a.wide / N), per_chunk = 16384 / N, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    const int64_t first = c * per_chunk, last = std::min(all, first + per_chunk);
    for (int64_t i = first; i < last; i += kBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kBatch, last - i));
      float x[kSize], y[kSize], factor[kBatch] = {}, s[kBatch] = {};
      uint32_t amax[kBatch] = {};
      const T* from = static_cast<const T*>(a.x) + i * N;
      T* to = static_cast<T*>(a.y) + i * N;
      for (int b = 0; b < batch; ++b) {
        load_all(x + b * N, from + b * N, N);
        amax[b] = largest_bits(x + b * N, N);
      }
      k.block_scales(factor, s, amax, kBatch);
      if (a.scales) std::copy_n(s, batch, static_cast<float*>(a.scales) + i);
      for (int b = 0; b < batch; ++b) {
        cast_all(y + b * N, x + b * N, N, k.round, factor[b], k.unscaled ? 1.0f : s[b], t);
        store_all(to + b * N, y + b * N, N);
      }
      if (Measure) {
        float scaled[kSize];
        for (int b = 0; b < batch; ++b) multiply_all(scaled + b * N, x + b * N, N, factor[b]);
        load_all(y, to, batch * N);
        measure_cast(x, y, scaled, batch * N, k.element, sums);
      }
    }
    if (Measure) sums.flush(parts[c], (last - first) * N);
  });
  return total(parts);
}

// Blocks along an axis whose neighbours lie `high` apart: tiles of columns, each with its own running maximum.
template <class T, bool Measure>
Stats cast_strided(const CastArgs& a) {
  constexpr int kTile = 64;
  const CastConstants k(a);
  const float t = k.decode();
  const int64_t block = a.scaling.columns, blocks = (a.wide + block - 1) / block;
  const int64_t tiles = (a.high + kTile - 1) / kTile, chunks = a.batch * blocks * tiles;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    const int64_t tile = c % tiles, b = (c / tiles) % blocks, batch = c / (tiles * blocks);
    const int64_t column = tile * kTile, start = b * block;
    const int width = static_cast<int>(std::min<int64_t>(kTile, a.high - column));
    const int64_t length = std::min(block, a.wide - start);
    const int64_t at = (batch * a.wide + start) * a.high + column;
    const T* from = static_cast<const T*>(a.x) + at;
    T* to = static_cast<T*>(a.y) + at;
    uint32_t amax[kTile] = {};
    for (int64_t i = 0; i < length; ++i)
#pragma omp simd
      for (int j = 0; j < width; ++j) amax[j] = std::max(amax[j], bits_of(load(from[i * a.high + j])) & kAbsMask);
    float factor[kTile], s[kTile];
    for (int j = 0; j < width; ++j) {
      const BlockScale scale = k.block_scale(amax[j]);
      factor[j] = scale.to_element;
      s[j] = k.decode(scale);
      if (a.scales) static_cast<float*>(a.scales)[(batch * blocks + b) * a.high + column + j] = scale.s;
    }
    const Rounder round = k.round;
    Sums sums;
    float x[kTile], y[kTile], scaled[kTile];
    for (int64_t i = 0; i < length; ++i) {
      load_all(x, from + i * a.high, width);
#pragma omp simd
      for (int j = 0; j < width; ++j) {
        scaled[j] = x[j] * factor[j];
        y[j] = (round(scaled[j]) * s[j]) * t;
      }
      store_all(to + i * a.high, y, width);
      if (Measure) {
        load_all(y, to + i * a.high, width);
        measure_cast(x, y, scaled, width, k.element, sums);
      }
    }
    if (Measure) sums.flush(parts[c], length * width);
  });
  return total(parts);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
