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
                        uint64_t key, uint32_t step) {
  const uint32_t first = static_cast<uint32_t>(column / 4);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) {
    c0[j] = first + static_cast<uint32_t>(j);
    c1[j] = static_cast<uint32_t>(row);
    c2[j] = static_cast<uint32_t>(row >> 32);
    c3[j] = step;
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

// The standard normals of the same columns.
AQN_HD void normal_tile(float* z, int64_t column, uint64_t row, uint64_t key, uint32_t step) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  philox_tile(c0, c1, c2, c3, column, row, key, step);
  float z0[kCounters], z1[kCounters], z2[kCounters], z3[kCounters];
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c0[j], c1[j], z0[j], z1[j]);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c2[j], c3[j], z2[j], z3[j]);
  interleave(z, z0, z1, z2, z3);
}

// What a perturbation did: y before, y' after, and the two as the output dtype holds them.
template <ErrorKind Kind>
AQN_HD void measure_perturb(const float* before, const float* after, const float* clean, const float* stored, int n,
                            Sums& sums) {
  for (int i = 0; i < n; i += kLanes) {
    const int lanes = std::min(kLanes, n - i);
#pragma omp simd
    for (int j = 0; j < lanes; ++j) {
      const float y = before[i + j], e = stored[i + j] - clean[i + j];
      const bool finite = is_finite(stored[i + j]);
      const bool measurable = is_finite(y) && (Kind == ErrorKind::kAbsoluteGaussian || y != 0.0f);
      const float unit = Kind == ErrorKind::kRelativeGaussian && measurable ? y : 1.0f;
      const float injected = measurable ? (after[i + j] - y) / unit : 0.0f;
      sums.error2[j] += is_finite(e) ? e * e : 0.0f;
      sums.reference2[j] += finite ? y * y : 0.0f;
      sums.injected2[j] += injected * injected;
      sums.injected_n[j] += measurable ? 1 : 0;
      sums.changed[j] += differs(stored[i + j], clean[i + j]) ? 1 : 0;
      sums.nonfinite[j] += finite ? 0 : 1;
    }
  }
}

template <class In, class Out, bool Measure, ErrorKind Kind>
AQN_HD void perturb_tile(const In* from, Out* to, const float* z, int n, float sigma, Sums& sums) {
  float y[kTile], after[kTile];
  load_all(y, from, n);
#pragma omp simd
  for (int j = 0; j < n; ++j) after[j] = perturbed(Kind, sigma, y[j], z[j]);
  if (Measure) {
    Out held[kTile];
    float clean[kTile], stored[kTile];
    store_all(held, y, n);
    load_all(clean, held, n);
    store_all(held, after, n);
    load_all(stored, held, n);
    measure_perturb<Kind>(y, after, clean, stored, n, sums);
  }
  store_all(to, after, n);
}

template <class In, class Out, bool Measure, ErrorKind Kind>
Stats perturb_typed(const PerturbArgs& a) {
  const int64_t tiles = (a.columns + kTile - 1) / kTile;
  const int64_t all = a.rows * tiles, per_chunk = 64, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    const int64_t last = std::min(all, (c + 1) * per_chunk);
    for (int64_t i = c * per_chunk; i < last; ++i) {
      const int64_t row = i / tiles, column = (i % tiles) * kTile;
      const int width = static_cast<int>(std::min<int64_t>(kTile, a.columns - column));
      const In* y = static_cast<const In*>(a.y) + row * a.columns + column;
      Out* out = static_cast<Out*>(a.out) + row * a.columns + column;
      float z[kTile];
      normal_tile(z, column, static_cast<uint64_t>(a.row_ids ? a.row_ids[row] : row), a.key, a.step);
      if (width == kTile)
        perturb_tile<In, Out, Measure, Kind>(y, out, z, kTile, a.sigma, sums);
      else
        perturb_tile<In, Out, Measure, Kind>(y, out, z, width, a.sigma, sums);
      count += width;
    }
    if (Measure) sums.flush(parts[c], count);
  });
  return total(parts);
}

template <class In, class Out>
Stats perturb_to(const PerturbArgs& a, bool measure) {
  if (a.kind == ErrorKind::kRelativeGaussian)
    return measure ? perturb_typed<In, Out, true, ErrorKind::kRelativeGaussian>(a)
                   : perturb_typed<In, Out, false, ErrorKind::kRelativeGaussian>(a);
  return measure ? perturb_typed<In, Out, true, ErrorKind::kAbsoluteGaussian>(a)
                 : perturb_typed<In, Out, false, ErrorKind::kAbsoluteGaussian>(a);
}

Stats perturb(const PerturbArgs& a, bool measure) {
  const bool bf16_in = a.in_dtype == Dtype::kBFloat16, bf16_out = a.out_dtype == Dtype::kBFloat16;
  if (bf16_in) return bf16_out ? perturb_to<bf16, bf16>(a, measure) : perturb_to<bf16, float>(a, measure);
  return bf16_out ? perturb_to<float, bf16>(a, measure) : perturb_to<float, float>(a, measure);
}

void normal(float* out, int64_t rows, int64_t columns, uint64_t key, uint32_t step) {
  float z[kTile];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += kTile) {
      normal_tile(z, column, static_cast<uint64_t>(row), key, step);
      std::copy_n(z, std::min<int64_t>(kTile, columns - column), out + row * columns + column);
    }
}

void random_words(uint32_t* out, const int64_t* row_ids, int64_t rows, int64_t columns, uint64_t key, uint32_t step,
                  int threads) {
  for_chunks(rows, threads, [&](int64_t row) {
    const uint64_t id = static_cast<uint64_t>(row_ids ? row_ids[row] : row);
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters], words[kTile];
    for (int64_t column = 0; column < columns; column += kTile) {
      philox_tile(c0, c1, c2, c3, column, id, key, step);
      interleave(words, c0, c1, c2, c3);
      std::copy_n(words, std::min<int64_t>(kTile, columns - column), out + row * columns + column);
    }
  });
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
