// Perturbations. `Spec` has what a chain of error models is, Spec::kCount and Spec::model(i), as literals; its numbers,
// which change from step to step, are arguments.
#pragma once

#include "../core/error.h"
#include "measure.cuh"
#include "noise.cuh"

namespace aqn::cuda {

constexpr int kMostModels = 8;

struct ModelSpec {
  ErrorKind kind;
  Draw draw;
  bool by_magnitude;  // a relative error is one of |A| @ |B|, not of |y|
  bool by_lane;       // decisions are made by column mod lanes alone
  bool drawn_bit;     // which bit flips is drawn
};

struct ModelNumbers {
  float a, b;         // sigma; gain, offset; threshold; limit; size; value
  uint32_t last_hit;  // the largest random word that is a hit
  int lanes, bit, unused;
};

// A contiguous [rows, columns] tensor and the chain of models that act on it.
struct PerturbArgs {
  const void* y;
  void* out;
  const float* magnitude;  // |A| @ |B|, laid out as y, where a model is relative to it
  double* parts;           // of measured kernels
  RowIds ids;
  Clock clock;
  uint64_t key;
  int64_t rows, columns;
  ModelNumbers models[kMostModels];
};

AQN_DEVICE float missed_by(ErrorKind kind, const ErrorModel& m, float y, float unit, float z, bool hit, uint32_t word) {
  switch (kind) {  // a literal: one case is left
    case ErrorKind::kRelativeGaussian:
      return missed<ErrorKind::kRelativeGaussian>(m, y, unit, z, hit, word);
    case ErrorKind::kAbsoluteGaussian:
      return missed<ErrorKind::kAbsoluteGaussian>(m, y, unit, z, hit, word);
    case ErrorKind::kSystematicBias:
      return missed<ErrorKind::kSystematicBias>(m, y, unit, z, hit, word);
    case ErrorKind::kDeadZone:
      return missed<ErrorKind::kDeadZone>(m, y, unit, z, hit, word);
    case ErrorKind::kSaturation:
      return missed<ErrorKind::kSaturation>(m, y, unit, z, hit, word);
    case ErrorKind::kSpike:
      return missed<ErrorKind::kSpike>(m, y, unit, z, hit, word);
    case ErrorKind::kStuck:
      return missed<ErrorKind::kStuck>(m, y, unit, z, hit, word);
    case ErrorKind::kBitFlip:
      return missed<ErrorKind::kBitFlip>(m, y, unit, z, hit, word);
  }
  return y;
}

// Columns [column, column + N) of a logical row.
struct Place {
  uint64_t row, column;
  int count;  // of these, how many are the tensor's
};

// One model of the chain on N values; returns how many it hit.
template <class Spec, bool Shifted, bool NarrowOut, int N>
AQN_DEVICE int miss(const PerturbArgs& a, uint64_t clock, int i, float (&y)[N], const float (&magnitude)[N],
                    const Place& p) {
  const ModelSpec s = Spec::model(i);
  const ModelNumbers& n = a.models[i];
  const bool rated = has_rate(s.kind), flips = s.kind == ErrorKind::kBitFlip;
  const ErrorModel m = {
      s.kind, 0, 0, 0, n.last_hit, n.a, n.b, s.by_magnitude, n.lanes, s.drawn_bit ? -1 : n.bit, NarrowOut ? 16 : 0};
  float z[N] = {};
  uint32_t words[N] = {};
  bool hit[N] = {};
  int hits = 0;
  if (flips && NarrowOut) {
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = held(y[j], static_cast<const bf16*>(nullptr));
  }
  if (rated) {
    const Stream decisions(a.key, clock, s.draw, 4 * i);
    if (s.by_lane) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        words[j] = decisions.one(0, (p.column + static_cast<uint64_t>(j)) % static_cast<uint64_t>(n.lanes));
    } else {
      random_words<Shifted>(words, decisions, p.row, p.column);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      hit[j] = words[j] <= n.last_hit && is_finite(y[j]) && j < p.count;
      hits += hit[j] ? 1 : 0;
    }
    if (hits == 0) return 0;
  }
  const Stream values(a.key, clock, s.draw, 4 * i + (rated ? 1 : 0));
  if (draws_normal(s.kind)) normals<Shifted>(z, values, p.row, p.column);
  if (flips && s.drawn_bit) random_words<Shifted>(words, values, p.row, p.column);
#pragma unroll
  for (int j = 0; j < N; ++j)
    y[j] = missed_by(s.kind, m, y[j], s.by_magnitude ? magnitude[j] : y[j], z[j], hit[j], words[j]);
  return hits;
}

// Whole: rows are whole vectors of N, 16 bytes apart. Else values are read and written one by one.
template <class Spec, class In, class Out, bool Whole, bool Shifted, bool Measured>
AQN_DEVICE void perturb(const PerturbArgs& a) {
  constexpr int N = Whole ? kVector<In> : 4;
  constexpr bool kNarrowOut = sizeof(Out) == 2;
  const bool alone = Spec::kCount == 1, absolute = Spec::model(0).kind == ErrorKind::kAbsoluteGaussian;
  const bool relative = alone && Spec::model(0).kind == ErrorKind::kRelativeGaussian;
  const uint64_t clock = a.clock.read();
  const int64_t per_row = (a.columns + N - 1) / N;
  const Quotient step = divided(thread_count(), per_row);
  Quotient at = divided(thread_index(), per_row);  // which row, and which N values of it
  const Out* as_out = nullptr;
  Sums sums;
  for (; at.whole < a.rows;) {
    const int64_t column = at.rest * N, index = at.whole * a.columns + column;
    const Place p = {a.ids.row(at.whole), (Shifted ? a.ids.first(at.whole) : 0) + static_cast<uint64_t>(column),
                     Whole ? N : static_cast<int>(smaller(N, a.columns - column))};
    const In* from = static_cast<const In*>(a.y) + index;
    Out* to = static_cast<Out*>(a.out) + index;
    float y[N] = {}, magnitude[N] = {}, before[N];
    if constexpr (Whole) {
      load_vector(y, from);
      if (Spec::kByMagnitude) load_vector(magnitude, a.magnitude + index);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j < p.count) y[j] = load(from[j]);
        if (Spec::kByMagnitude && j < p.count) magnitude[j] = a.magnitude[index + j];
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) before[j] = y[j];
#pragma unroll
    for (int i = 0; i < Spec::kCount; ++i) {
      const int hits = miss<Spec, Shifted, kNarrowOut>(a, clock, i, y, magnitude, p);
      if (Measured) sums.hits += static_cast<uint32_t>(hits);
    }
    if (Measured) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float unit =
            relative ? (Spec::kByMagnitude ? magnitude[j] : before[j]) : (alone && absolute ? 1.0f : 0.0f);
        if (j < p.count) sums.perturb(before[j], y[j], held(before[j], as_out), held(y[j], as_out), unit);
      }
    }
    if constexpr (Whole) {
      store_vector(to, y);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (j < p.count) store_one(to + j, y[j]);
    }
    at = {at.whole + step.whole, at.rest + step.rest};
    if (at.rest >= per_row) at = {at.whole + 1, at.rest - per_row};
  }
  if (Measured) sums.write(a.parts);
}

}  // namespace aqn::cuda
