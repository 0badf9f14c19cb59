// Random words, normals and errors of logical coordinates.
#pragma once

#include "../core/error.h"
#include "draws.h"
#if defined(__AVX512F__)
#include "relative_avx512.h"
#endif

namespace aqn::cpu::AQN_ISA {
namespace {

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

// Part of a logical row: columns [column + low, column + high) of it, of which the first is the value at `offset` of a
// line. column is a multiple of 4, so that a tile is made of whole Philox blocks wherever the line begins.
struct Tile {
  uint64_t row;
  int64_t column, offset;
  int low, high;
};

// n values from a column of a logical row on, in tiles.
template <class Body>
AQN_HD void for_tiles(uint64_t row, int64_t column, int64_t n, const Body& body) {
  const int shift = static_cast<int>(column % 4);
  for (int64_t start = -shift; start < n; start += kTile)
    body(
        Tile{row, column + start, start, start < 0 ? shift : 0, static_cast<int>(std::min<int64_t>(kTile, n - start))});
}

// A contiguous [rows, columns] matrix in lines: rows, or parts of them of a fixed length, so that sums over a chunk of
// lines depend on the shape alone. The lines of a chunk follow each other in memory.
class Lines {
 public:
  static constexpr int64_t kLine = 4096, kChunk = 8192;

  Lines(int64_t rows, int64_t columns, int64_t line = kLine)
      : columns_(columns), line_(line), per_row_((columns + line - 1) / line), count_(rows * per_row_) {
    per_chunk_ = std::max<int64_t>(1, kChunk / std::min(columns, line));
    chunks = (count_ + per_chunk_ - 1) / per_chunk_;
  }
  int64_t chunks = 0;

  // body(row, column, n) for each line of a chunk
  template <class Body>
  void for_each(int64_t chunk, const Body& body) const {
    const int64_t last = std::min(count_, (chunk + 1) * per_chunk_);
    for (int64_t i = chunk * per_chunk_; i < last; ++i) {
      const int64_t column = (i % per_row_) * line_;
      body(i / per_row_, column, std::min(line_, columns_ - column));
    }
  }

  // Where a chunk stands in memory.
  struct Range {
    int64_t at, count;
  };
  Range range(int64_t chunk) const {
    const int64_t from = start(chunk * per_chunk_), to = start(std::min(count_, (chunk + 1) * per_chunk_));
    return {from, to - from};
  }

 private:
  int64_t start(int64_t line) const { return line / per_row_ * columns_ + line % per_row_ * line_; }

  int64_t columns_, line_, per_row_, count_, per_chunk_ = 0;
};

// Logical row and first column of a row of a matrix.
AQN_HD uint64_t logical_row(const RowIds& ids, int64_t r) {
  return static_cast<uint64_t>(ids.at ? ids.at[ids.pairs ? 2 * r : r] : r);
}
AQN_HD int64_t first_column(const RowIds& ids, int64_t r) { return ids.pairs ? ids.at[2 * r + 1] : 0; }

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
    const double to = comparable ? held : 0.0f, from = comparable ? was : 0.0f, error = to - from;
    const double reference = finite ? y : 0.0f, injected = measurable ? share : 0.0f;
    sums.error2[lane] += error * error;
    sums.reference2[lane] += reference * reference;
    sums.injected2[lane] += injected * injected;
    sums.injected_n[lane] += measurable ? 1 : 0;
    sums.changed[lane] += differs(held, was) ? 1 : 0;
    sums.nonfinite[lane] += finite ? 0 : 1;
  });
}

template <class T>
AQN_HD void load_tile(float* to, const T* line, const Tile& t) {
  if (t.high - t.low == kTile)
    load_all(to, line + t.offset, kTile);  // a fixed number of values needs no loop
  else
    load_all(to + t.low, line + t.offset + t.low, t.high - t.low);
}

template <class T>
AQN_HD void store_tile(T* line, const float* from, const Tile& t) {
  if (t.high - t.low == kTile)
    store_all(line + t.offset, from, kTile);
  else
    store_all(line + t.offset + t.low, from + t.low, t.high - t.low);
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

// n values that stand from `column` of a row of the whole matrix on, through the chain of models. The matrix that `a`
// describes gives the logical rows and the models; where the values stand is told apart from it.
template <class In, class Out, bool Measure>
void perturb_line(const PerturbArgs& a, int64_t row, int64_t column, int64_t n, const In* y, Out* out,
                  const float* magnitudes, Sums& sums) {
  const ErrorModel* one = a.models_count == 1 ? a.models : nullptr;
  const bool relative = one && one->kind == ErrorKind::kRelativeGaussian;
  const bool absolute = one && one->kind == ErrorKind::kAbsoluteGaussian;
  // Outside of a tile's own values stand those of the one before: they are computed with and never stored.
  float x[kTile] = {}, magnitude[kTile] = {}, before[kTile], constant[kTile];
  std::fill_n(constant, kTile, absolute ? 1.0f : 0.0f);
  const float* unit = relative ? (one->by_magnitude ? magnitude : before) : constant;
#if defined(__AVX512F__)
  const bool of_output = relative && !one->by_magnitude;
  const PhiloxRow shared(logical_row(a.row_ids, row), of_output ? one->key : 0, of_output ? one->word : 0);
#endif
  for_tiles(logical_row(a.row_ids, row), first_column(a.row_ids, row) + column, n, [&](const Tile& t) {
#if defined(__AVX512F__)
    if (of_output && t.high - t.low == kTile &&
        relative_tile<In, Out, Measure>(one->a, shared, t.column, y + t.offset, out + t.offset, sums))
      return;
#endif
    load_tile(x, y, t);
    if (magnitudes) load_tile(magnitude, magnitudes, t);
    if (Measure) std::copy_n(x, kTile, before);
    int hits = 0;
    for (int m = 0; m < a.models_count; ++m) hits += miss_tile(a.models[m], x, magnitude, t);
    if (Measure) {
      measure_tile<Out>(before, x, unit, t, sums);
      sums.hits += hits;
    }
    store_tile(out, x, t);
  });
}

// Part of the matrix that `a` describes, which a kernel has just computed in fp32: rows [row, row + rows) and columns
// [column, column + columns), whose first value stands at y and at out, lines y_stride and out_stride apart. a.y and
// a.out are not used. Adds what it measured to `stats`: add those of the parts in an order that no thread changes.
template <class Out, bool Measure>
void perturb_part(const PerturbArgs& a, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* y,
                  int64_t y_stride, Out* out, int64_t out_stride, Stats& stats) {
  Sums sums;
  for (int64_t r = 0; r < rows; ++r) {
    const float* magnitude = a.magnitude ? a.magnitude + (row + r) * a.columns + column : nullptr;
    perturb_line<float, Out, Measure>(a, row + r, column, columns, y + r * y_stride, out + r * out_stride, magnitude,
                                      sums);
  }
  if (Measure) sums.flush(stats, rows * columns);
}

template <class In, class Out, bool Measure>
Stats perturb_typed(const PerturbArgs& a) {
  const Lines lines(a.rows, a.columns);
  std::vector<Stats> parts(Measure ? lines.chunks : 0);
  for_chunks(lines.chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    lines.for_each(c, [&](int64_t row, int64_t column, int64_t n) {
      const int64_t at = row * a.columns + column;
      perturb_line<In, Out, Measure>(a, row, column, n, static_cast<const In*>(a.y) + at, static_cast<Out*>(a.out) + at,
                                     a.magnitude ? a.magnitude + at : nullptr, sums);
      count += n;
    });
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
  if (a.rows == 0 || a.columns == 0) return {};
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
  if (rows == 0 || columns == 0) return;
  const Lines lines(rows, columns);
  for_chunks(lines.chunks, threads, [&](int64_t c) {
    uint32_t words[kTile];
    lines.for_each(c, [&](int64_t row, int64_t column, int64_t n) {
      uint32_t* to = out + row * columns + column;
      for_tiles(logical_row(row_ids, row), first_column(row_ids, row) + column, n, [&](const Tile& t) {
        word_tile(words, t.column, t.row, key, word);
        std::copy(words + t.low, words + t.high, to + t.offset + t.low);
      });
    });
  });
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
