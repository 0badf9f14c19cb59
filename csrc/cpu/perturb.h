// Random words, normals and errors of logical coordinates.
#pragma once

#include "../core/normal.h"
#include "../core/philox.h"
#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kCounters = 32;         // Philox blocks at a time
constexpr int kTile = 4 * kCounters;  // and the columns that they serve

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

// The random words that logical row 0 has in columns modulo `lanes`.
AQN_HD void lane_tile(uint32_t* words, int64_t column, int lanes, uint64_t key, uint32_t word) {
  uint32_t lane[kTile];
  uint32_t at = static_cast<uint32_t>(column % lanes);
  for (int j = 0; j < kTile; ++j) {
    lane[j] = at;
    at = at + 1 == static_cast<uint32_t>(lanes) ? 0 : at + 1;
  }
#pragma omp simd
  for (int j = 0; j < kTile; ++j) {
    uint32_t c0 = lane[j] / 4, c1 = 0, c2 = 0, c3 = word;
    philox4x32_10(c0, c1, c2, c3, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    const uint32_t i = lane[j] % 4;
    words[j] = i == 0 ? c0 : (i == 1 ? c1 : (i == 2 ? c2 : c3));
  }
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

// Part of a logical row: columns [column + low, column + high) of it stand in memory from `offset` on. column is a
// multiple of 4, so that a tile is made of whole Philox blocks wherever the row begins.
struct Tile {
  uint64_t row;
  int64_t column, offset;
  int low, high;
};

// A contiguous [rows, columns] matrix in tiles. Some are empty where rows begin within a block.
class Tiling {
 public:
  Tiling(const RowIds& ids, int64_t rows, int64_t columns)
      : ids_(ids), columns_(columns), per_row_((columns + (ids.pairs ? 3 : 0) + kTile - 1) / kTile) {
    count = rows * per_row_;
  }
  int64_t count;

  Tile operator[](int64_t i) const {
    const int64_t r = i / per_row_, start = (i % per_row_) * kTile;
    const int64_t first = ids_.pairs ? ids_.at[2 * r + 1] : 0, shift = first % 4;
    const int64_t id = ids_.pairs ? ids_.at[2 * r] : (ids_.at ? ids_.at[r] : r);
    const int low = start == 0 ? static_cast<int>(shift) : 0;
    const int high = static_cast<int>(std::max<int64_t>(low, std::min<int64_t>(kTile, columns_ + shift - start)));
    return {static_cast<uint64_t>(id), first - shift + start, r * columns_ + start + low - shift, low, high};
  }

 private:
  RowIds ids_;
  int64_t columns_, per_row_;
};

// Which values a model with a rate hits; returns how many of them are the tile's own.
inline int decide(const ErrorModel& m, uint32_t* hit, const float* y, const Tile& t) {
  uint32_t words[kTile];
  if (m.lanes)
    lane_tile(words, t.column, m.lanes, m.key, m.word);
  else
    word_tile(words, t.column, t.row, m.key, m.word);
#pragma omp simd
  for (int j = 0; j < kTile; ++j) hit[j] = words[j] <= m.last_hit && is_finite(y[j]) ? 1 : 0;
  int hits = 0;
  for (int j = t.low; j < t.high; ++j) hits += static_cast<int>(hit[j]);
  return hits;
}

// One model on a tile of values; returns how many of them it hit.
template <ErrorKind Kind>
AQN_HD int miss(const ErrorModel m, float* y, const float* magnitude, const Tile& t) {
  constexpr bool rated = has_rate(Kind), normal = draws_normal(Kind), flips = Kind == ErrorKind::kBitFlip;
  float z[kTile];
  uint32_t hit[kTile], words[kTile];
  int hits = 0;
  if (flips && m.low_bit)
    for (int j = 0; j < kTile; ++j) y[j] = to_bf16(y[j]);
  if (rated && (hits = decide(m, hit, y, t)) == 0) return 0;
  if (normal) normal_tile(z, t.column, t.row, rated ? m.hit_key : m.key, m.word);
  if (flips && m.bit < 0) word_tile(words, t.column, t.row, m.hit_key, m.word);
  const float* unit = m.by_magnitude ? magnitude : y;
#pragma omp simd
  for (int j = 0; j < kTile; ++j)
    y[j] = missed<Kind>(m, y[j], unit[j], normal ? z[j] : 0.0f, rated && hit[j], flips ? words[j] : 0u);
  return hits;
}

AQN_HD int miss_tile(const ErrorModel& m, float* y, const float* magnitude, const Tile& t) {
  switch (m.kind) {
    case ErrorKind::kRelativeGaussian:
      return miss<ErrorKind::kRelativeGaussian>(m, y, magnitude, t);
    case ErrorKind::kAbsoluteGaussian:
      return miss<ErrorKind::kAbsoluteGaussian>(m, y, magnitude, t);
    case ErrorKind::kSystematicBias:
      return miss<ErrorKind::kSystematicBias>(m, y, magnitude, t);
    case ErrorKind::kDeadZone:
      return miss<ErrorKind::kDeadZone>(m, y, magnitude, t);
    case ErrorKind::kSaturation:
      return miss<ErrorKind::kSaturation>(m, y, magnitude, t);
    case ErrorKind::kSpike:
      return miss<ErrorKind::kSpike>(m, y, magnitude, t);
    case ErrorKind::kStuck:
      return miss<ErrorKind::kStuck>(m, y, magnitude, t);
    case ErrorKind::kBitFlip:
      return miss<ErrorKind::kBitFlip>(m, y, magnitude, t);
  }
  return 0;
}

// What a perturbation did to n values: y before and after in fp32, and the two as the output holds them. What was
// injected is measured in units of what a lone Gaussian model misses by a share of.
AQN_HD void measure_perturb(const float* before, const float* after, const float* clean, const float* stored,
                            const float* unit, int n, Sums& sums) {
  in_lanes(n, [&](int i, int lane) {
    const float y = before[i], u = unit[i], held = stored[i], was = clean[i];
    const bool finite = is_finite(held), comparable = finite & is_finite(was);
    const bool sound = is_finite(y) & is_finite(u) & (u != 0.0f);
    const float share = (after[i] - y) / (sound ? u : 1.0f);
    const bool measurable = sound & is_finite(share);
    const double half = comparable ? 0.5f * held - 0.5f * was : 0.0f;  // of the error, which may exceed fp32
    const double reference = finite ? y : 0.0f, injected = measurable ? share : 0.0f;
    sums.error2[lane] += 4 * half * half;
    sums.reference2[lane] += reference * reference;
    sums.injected2[lane] += injected * injected;
    sums.injected_n[lane] += measurable ? 1 : 0;
    sums.changed[lane] += differs(held, was) ? 1 : 0;
    sums.nonfinite[lane] += finite ? 0 : 1;
  });
}

template <class T>
AQN_HD void load_tile(float* to, const void* from, const Tile& t) {
  const T* p = static_cast<const T*>(from) + t.offset;
  if (t.high - t.low == kTile)
    load_all(to, p, kTile);  // a fixed number of values needs no loop
  else
    load_all(to + t.low, p, t.high - t.low);
}

template <class T>
AQN_HD void store_tile(void* to, const float* from, const Tile& t) {
  T* p = static_cast<T*>(to) + t.offset;
  if (t.high - t.low == kTile)
    store_all(p, from, kTile);
  else
    store_all(p, from + t.low, t.high - t.low);
}

template <class Out>
void measure_tile(const float* before, const float* after, const float* unit, const Tile& t, Sums& sums) {
  Out held[kTile];
  float clean[kTile], stored[kTile];
  store_all(held, before, kTile);
  load_all(clean, held, kTile);
  store_all(held, after, kTile);
  load_all(stored, held, kTile);
  const int low = t.low;
  measure_perturb(before + low, after + low, clean + low, stored + low, unit + low, t.high - low, sums);
}

template <class In, class Out, bool Measure>
Stats perturb_typed(const PerturbArgs& a) {
  const Tiling tiles(a.row_ids, a.rows, a.columns);
  const int64_t per_chunk = 64, chunks = (tiles.count + per_chunk - 1) / per_chunk;
  const ErrorModel* one = a.models_count == 1 ? a.models : nullptr;
  const bool relative = one && one->kind == ErrorKind::kRelativeGaussian;
  const bool absolute = one && one->kind == ErrorKind::kAbsoluteGaussian;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    // Outside of a tile's own values stand those of the one before: they are computed with and never stored.
    float y[kTile] = {}, magnitude[kTile] = {}, before[kTile], constant[kTile];
    std::fill_n(constant, kTile, absolute ? 1.0f : 0.0f);
    const float* unit = relative ? (one->by_magnitude ? magnitude : before) : constant;
    const int64_t last = std::min(tiles.count, (c + 1) * per_chunk);
    for (int64_t i = c * per_chunk; i < last; ++i) {
      const Tile t = tiles[i];
      load_tile<In>(y, a.y, t);
      if (a.magnitude) load_tile<float>(magnitude, a.magnitude, t);
      if (Measure) std::copy_n(y, kTile, before);
      int hits = 0;
      for (int m = 0; m < a.models_count; ++m) hits += miss_tile(a.models[m], y, magnitude, t);
      if (Measure) {
        measure_tile<Out>(before, y, unit, t, sums);
        sums.hits += hits;
      }
      store_tile<Out>(a.out, y, t);
      count += t.high - t.low;
    }
    if (Measure) sums.flush(parts[c], count);
  });
  return total(parts);
}

template <class In, class Out>
Stats perturb_to(const PerturbArgs& a, bool measure) {
  return measure ? perturb_typed<In, Out, true>(a) : perturb_typed<In, Out, false>(a);
}

Stats perturb(const PerturbArgs& a, bool measure) {
  const bool bf16_in = a.in_dtype == Dtype::kBFloat16, bf16_out = a.out_dtype == Dtype::kBFloat16;
  if (bf16_in) return bf16_out ? perturb_to<bf16, bf16>(a, measure) : perturb_to<bf16, float>(a, measure);
  return bf16_out ? perturb_to<float, bf16>(a, measure) : perturb_to<float, float>(a, measure);
}

void normal(float* out, int64_t rows, int64_t columns, uint64_t key, uint32_t word) {
  float z[kTile];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += kTile) {
      normal_tile(z, column, static_cast<uint64_t>(row), key, word);
      std::copy_n(z, std::min<int64_t>(kTile, columns - column), out + row * columns + column);
    }
}

void random_words(uint32_t* out, const RowIds& row_ids, int64_t rows, int64_t columns, uint64_t key, uint32_t word,
                  int threads) {
  const Tiling tiles(row_ids, rows, columns);
  const int64_t per_chunk = 64, chunks = (tiles.count + per_chunk - 1) / per_chunk;
  for_chunks(chunks, threads, [&](int64_t c) {
    uint32_t words[kTile];
    for (int64_t i = c * per_chunk; i < std::min(tiles.count, (c + 1) * per_chunk); ++i) {
      const Tile t = tiles[i];
      word_tile(words, t.column, t.row, key, word);
      std::copy(words + t.low, words + t.high, out + t.offset);
    }
  });
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
