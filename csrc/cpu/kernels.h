// The CPU kernels' interface: raw pointers, sizes and a thread count; no torch.
#pragma once

#include <cstdint>

#include "../core/accumulate.h"
#include "../core/block.h"
#include "../core/codes.h"
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

// The logical rows of a matrix: none for 0, 1, 2, ..., one number a row, or pairs of a row and its first column.
struct RowIds {
  const int64_t* at;
  bool pairs;
};

// Where the random words of a stochastic rounding come from: of the tensor as a matrix of so many columns, 0 for none.
struct Draws {
  RowIds row_ids;
  int64_t columns;
  uint64_t key;
  uint32_t word;
};

// A contiguous tensor seen as [batch, high, wide] matrices; blocks lie along `wide`.
struct CastArgs {
  const void* x;
  void* y;       // may be x: what shares a scale is read before it is written
  void* scales;  // optional: one fp32 value (for HiF4, 32 bits of levels) a block, as the blocks lie in memory
  Draws draws;
  Dtype dtype;
  int64_t batch, high, wide;
  bool row_major;  // whether neighbours along `wide` are neighbours in memory; else those along `high` are
  Element element;
  Scaling scaling;    // 0 rows: the whole tensor is one block
  float tensor_amax;  // for a scale of the tensor
  bool unscaled;      // store the elements q instead of the values
  int threads;
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

// A matrix for each of a batch, strides in elements; one of row_stride and depth_stride is 1. Rows are those of a and
// the columns of b, depth is the contraction.
struct ProductOperand {
  const void* at;
  int64_t batch_stride, row_stride, depth_stride;
};

// bf16 [batch, m, k] and [batch, k, n] to [batch, m, n] by the host's own instruction, summed in fp32; then the bias
// and the chain of models of `result`, whose y is not used: as the sums of a tile are there. Without models the result
// is fp32.
struct ProductArgs {
  ProductOperand a, b;
  int64_t batch, m, k, n;
  const float* bias;    // optional: [n]
  bool bias_is_missed;  // whether it is added before the models act
  PerturbArgs result;
  int threads;
};

// How a block's scale is stored, and what the tensor's does to it: before it meets an element, or after.
enum class ScaleCode : int { kNone = 0, kE8m0 = 1, kE4m3 = 2, kFloat = 3, kHif4 = 4 };
enum class ScaleUse : int { kAlone = 0, kTimesTensor = 1, kOverTensor = 2, kTensorAfter = 3 };

// A contiguous [high, wide] tensor with blocks along its rows, one row or many: to codes, at y, and stored scales.
struct PackArgs {
  CastArgs cast;
  Codes codes;
  ScaleCode scale_code;
};

// Contiguous [rows, columns] of values on a format's grid, to codes.
struct EncodeArgs {
  const float* x;
  void* y;
  int64_t rows, columns;
  Codes codes;
  int threads;
};

// Codes of a contiguous [rows, columns] tensor, to values. Rows are [outer, along, inner]; `per_block` of those along
// the middle share scales, as `run` columns do.
struct UnpackArgs {
  const void* from;
  const void* scales;
  void* y;
  Dtype dtype;  // of y
  int64_t rows, columns;
  int64_t along, inner, per_block, run;
  Codes codes;
  ScaleCode scale_code;
  ScaleUse scale_use;
  float tensor_scale;
  int threads;
};

// One table for each instruction set.
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
  int64_t (*pack)(const PackArgs&);      // returns how many NaNs have neither a code nor a scale that says so
  int64_t (*encode)(const EncodeArgs&);  // returns how many NaNs have no code
  void (*unpack)(const UnpackArgs&);
  Stats (*product)(const ProductArgs&, bool measure);  // null where the processor does not multiply bf16 matrices
};

const Kernels& kernels();  // the best table that this processor can run

}  // namespace aqn::cpu
