// The CPU kernels' interface: raw pointers, sizes and a thread count; no torch.
#pragma once

#include <cstdint>

#include "../core/accumulate.h"
#include "../core/block.h"
#include "../core/error.h"

namespace aqn::cpu {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

// What a kernel measured of its own effect. Sums are made per fixed chunk and added in chunk order, so that they do not
// depend on the number of threads.
struct Stats {
  double count = 0;       // elements
  double changed = 0;     // elements whose stored value differs from the stored input
  double error2 = 0;      // sum of (stored output - stored input)^2
  double reference2 = 0;  // sum of (input)^2
  double injected2 = 0;   // perturb by one Gaussian model: sum of ((y' - y) / its unit)^2, before the output is rounded
  double injected_n = 0;  // elements in injected2
  double saturated = 0;   // cast: elements that were beyond the element format's range when they reached it
  double nonfinite = 0;   // elements that came out NaN or Inf
  double hits = 0;        // perturb: hits by models that have a rate
};

// A contiguous tensor seen as [batch, high, wide] matrices; blocks lie along `wide`.
struct CastArgs {
  const void* x;
  void* y;
  void* scales;           // optional: one fp32 value (for HiF4, 32 bits of levels) a block, as the blocks lie in memory
  const uint32_t* words;  // optional: one random word an element, laid out as x
  Dtype dtype;
  int64_t batch, high, wide;
  bool row_major;  // whether neighbours along `wide` are neighbours in memory; else those along `high` are
  Element element;
  Scaling scaling;    // 0 rows: the whole tensor is one block
  float tensor_amax;  // for a scale of the tensor
  bool unscaled;      // store the elements q instead of the values
  int threads;
};

// The logical rows of a matrix: none for 0, 1, 2, ..., one number a row, or pairs of a row and its first column.
struct RowIds {
  const int64_t* at;
  bool pairs;
};

// A contiguous [rows, columns] tensor and the chain of models that act on it.
struct PerturbArgs {
  const void* y;
  void* out;
  Dtype in_dtype, out_dtype;
  int64_t rows, columns;
  RowIds row_ids;
  const float* magnitude;  // optional: |A| @ |B|, laid out as y
  const ErrorModel* models;
  int models_count;
  int threads;
};

// A perturbation, of no models or more and without a magnitude, then a cast along the last axis in the dtype of y, then
// the conversion to that of out. Of `cast` only the format counts.
struct FinishArgs {
  PerturbArgs perturb;
  CastArgs cast;
};
struct Finished {
  Stats error, cast;
};

// Contiguous [batch, m, k] and [batch, k, n] to fp32 [batch, m, n].
struct GemmArgs {
  const void *a, *b;
  float* out;
  Dtype dtype;  // of a and b
  int64_t batch, m, k, n;
  Accumulator accumulator;
  int threads;
};

// One table for each instruction set that kernels.cpp is compiled for.
struct Kernels {
  const char* isa;
  Stats (*cast)(const CastArgs&, bool measure);
  Stats (*perturb)(const PerturbArgs&, bool measure);
  Finished (*finish)(const FinishArgs&, bool measure);
  float (*amax)(const void* x, Dtype, int64_t n, int threads);
  void (*normal)(float* out, int64_t rows, int64_t columns, uint64_t key, uint32_t word);
  void (*random_words)(uint32_t* out, const RowIds&, int64_t rows, int64_t columns, uint64_t key, uint32_t word,
                       int threads);
  void (*gemm)(const GemmArgs&);
};

const Kernels& kernels();  // the best table that this processor can run

}  // namespace aqn::cpu
