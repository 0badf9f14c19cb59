// GEMMs whose products are added as a matrix unit adds them: kColumns columns of the result at a time in lanes, chunk
// by chunk of K over a block of rows, so that a chunk of b is split into significands and exponents once a block.
#pragma once

#include <memory>

#include "../core/accumulate.h"
#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kColumns = 64, kRows = 64;

// One chunk of operands: of b as [chunk, kColumns], of a as [kRows, chunk].
struct Operands {
  std::vector<float> value, significand;
  std::vector<int> exponent, aligned;
  bool special = false;                                // whether there is an infinity or a NaN
  int smallest = -kNoExponent, largest = kNoExponent;  // exponents

  explicit Operands(int64_t n) : value(n), significand(n), exponent(n), aligned(n) {}

  void split(const Accumulator& k, int64_t n) {
    int specials = 0, lowest = -kNoExponent, highest = kNoExponent;
#pragma omp simd reduction(+ : specials) reduction(min : lowest) reduction(max : highest)
    for (int64_t i = 0; i < n; ++i) {
      const Operand o = operand_of(value[i], k);
      significand[i] = o.significand;
      exponent[i] = o.exponent;
      aligned[i] = o.aligned;
      specials += is_finite(value[i]) ? 0 : 1;
      lowest = std::min(lowest, o.exponent == kNoExponent ? -kNoExponent : o.exponent);
      highest = larger(highest, o.aligned);
    }
    special = specials != 0;
    smallest = lowest;
    largest = highest;
  }

  void flush(const Accumulator& k, int64_t n) {
    const float smallest = exp2_of(k.min_exponent);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) value[i] = abs_of(value[i]) < smallest ? 0.0f : value[i];
  }
};

// The running and the promoted sums of a block.
struct BlockSums {
  float running[kRows][kColumns] = {}, total[kRows][kColumns] = {};

  void promote() {
    for (int r = 0; r < kRows; ++r)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) {
        total[r][j] += running[r][j];
        running[r][j] = 0.0f;
      }
  }
};

// Whether products of the values, and the units that they are cut to, stay among fp32's normal numbers. If not,
// products of significands do.
bool stays_normal(const Operands& a, const Operands& b, const Accumulator& k) {
  return !a.special && !b.special && a.largest + b.largest <= 125 && a.smallest + b.smallest >= k.fraction_bits - 126;
}

// The sum of the products at first, first + Step, ... under their largest exponent, which is raised to `largest`.
template <class Term, class Sum, bool Nearest, int Step>
AQN_HD void add_products(Sum* sum, int* largest, const Operands& a, const Operands& b, int64_t row, int first,
                         const Accumulator& k) {
  for (int i = first; i < k.chunk; i += Step) {
    const int own = a.aligned[row * k.chunk + i];
    const int* others = b.aligned.data() + i * kColumns;
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) largest[j] = larger(largest[j], own + others[j]);
  }
  if (stays_normal(a, b, k)) {
    float scale[kColumns];
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) scale[j] = exp2_of(std::min(k.fraction_bits - largest[j], 127));
    for (int i = first; i < k.chunk; i += Step) {
      const float x = a.value[row * k.chunk + i];
      const float* values = b.value.data() + i * kColumns;
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) sum[j] += static_cast<Sum>(cut<Term, Nearest>(x * values[j] * scale[j]));
    }
    return;
  }
  for (int i = first; i < k.chunk; i += Step) {
    const float s = a.significand[row * k.chunk + i];
    const int e = a.exponent[row * k.chunk + i];
    const float* significands = b.significand.data() + i * kColumns;
    const int* exponents = b.exponent.data() + i * kColumns;
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      const int below = larger(e + exponents[j] - largest[j], -64);  // a summand so far below is cut to 0
      const float scale = exp2_of(below + k.fraction_bits);
      sum[j] += static_cast<Sum>(cut<Term, Nearest>(s * significands[j] * scale));
    }
  }
}

// One row of a chunk, products and running sum at once. Term holds a summand and Sum their sum, both exactly.
template <class Term, class Sum, bool Nearest>
void add_fused(float* after, const float* before, const Operands& a, const Operands& b, int64_t row,
               const Accumulator& k) {
  int largest[kColumns];
  Sum sum[kColumns] = {};
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) largest[j] = larger(running_exponent(before[j]), -126);
  add_products<Term, Sum, Nearest, 1>(sum, largest, a, b, row, 0, k);
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) {
    const double own = static_cast<double>(before[j]) * double_exp2_of(k.fraction_bits - largest[j]);
    const double total = static_cast<double>(sum[j]) + static_cast<double>(cut<Term, Nearest>(own));
    after[j] = result_of(total * double_exp2_of(largest[j] - k.fraction_bits), k);
  }
}

// One row of a chunk, the products (all, or those at even and at odd places) before the running sum.
template <class Term, bool Nearest>
void add_products_first(float* after, const float* before, const Operands& a, const Operands& b, int64_t row,
                        const Accumulator& k) {
  int largest[kColumns], odd_largest[kColumns];
  double sum[kColumns] = {}, odd[kColumns] = {};
  std::fill_n(largest, kColumns, kLowestExponent);
  if (k.order == Order::kProductsFirst) {
    add_products<Term, double, Nearest, 1>(sum, largest, a, b, row, 0, k);
  } else {
    std::fill_n(odd_largest, kColumns, kLowestExponent);
    add_products<Term, double, Nearest, 2>(sum, largest, a, b, row, 0, k);
    add_products<Term, double, Nearest, 2>(odd, odd_largest, a, b, row, 1, k);
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      const int common = larger(largest[j], odd_largest[j]);
      sum[j] = round_down(sum[j] * double_exp2_of(largest[j] - common)) +
               round_down(odd[j] * double_exp2_of(odd_largest[j] - common));
      largest[j] = common;
    }
  }
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) after[j] = result_of(with_running(sum[j], largest[j], before[j], k), k);
}

// Whether a product of the chunk may be no number of the unit. Where products come first they have the range of fp32.
bool has_specials(const Operands& a, const Operands& b, const Accumulator& k) {
  return a.special || b.special || (k.order != Order::kFused && a.largest + b.largest >= 127);
}

// The sum of such products, by IEEE's rules; else 0.
void add_specials(float* outside, const Operands& a, const Operands& b, int64_t row, const Accumulator& k) {
  for (int i = 0; i < k.chunk; ++i) {
    const float x = a.value[row * k.chunk + i];
    for (int j = 0; j < kColumns; ++j) {
      const float y = b.value[i * kColumns + j], product = x * y;
      const bool number = is_finite(x) && is_finite(y) && (k.order == Order::kFused || is_finite(product));
      outside[j] += number ? 0.0f : product;
    }
  }
}

// One row of a chunk in fp32: the products' tree of sums, then the running sum.
void add_pairwise(float* running, const Operands& a, const Operands& b, int64_t row, float* tree,
                  const Accumulator& k) {
  const float smallest = k.flush ? 1.17549435e-38f : 0.0f;
  for (int i = 0; i < k.chunk; ++i) {
    const float x = a.value[row * k.chunk + i];
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      const float product = x * b.value[i * kColumns + j];
      tree[i * kColumns + j] = abs_of(product) < smallest ? 0.0f : product;
    }
  }
  for (int n = k.chunk / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) {
        const float sum = tree[2 * i * kColumns + j] + tree[(2 * i + 1) * kColumns + j];
        tree[i * kColumns + j] = abs_of(sum) < smallest ? 0.0f : sum;
      }
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) {
    const float sum = running[j] + tree[j];
    running[j] = abs_of(sum) < smallest ? 0.0f : sum;
  }
}

// One row of a chunk in fixed point; infinities and NaNs are added apart.
template <bool Nearest>
void add_aligned(float* running, const Operands& a, const Operands& b, int64_t row, const Accumulator& k) {
  float before[kColumns], after[kColumns], outside[kColumns] = {};
  if (has_specials(a, b, k)) add_specials(outside, a, b, row, k);
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) before[j] = is_finite(running[j]) ? running[j] : 0.0f;
  const int term_bits = k.fraction_bits + 2;  // a product is below 2^2 of its unit's exponent
  const bool is_wide = term_bits > 30;
  if (k.order != Order::kFused)
    is_wide ? add_products_first<int64_t, Nearest>(after, before, a, b, row, k)
            : add_products_first<int32_t, Nearest>(after, before, a, b, row, k);
  else if (is_wide)
    add_fused<int64_t, double, Nearest>(after, before, a, b, row, k);
  else if (static_cast<int64_t>(k.chunk + 1) << term_bits >= int64_t{1} << 31)
    add_fused<int32_t, double, Nearest>(after, before, a, b, row, k);
  else
    add_fused<int32_t, int32_t, Nearest>(after, before, a, b, row, k);
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) {
    const float beyond = running[j] + outside[j];
    running[j] = is_finite(beyond) ? after[j] : beyond;
  }
}

template <class T, bool Nearest>
void gemm_block(const GemmArgs& g, int64_t batch, int64_t first_row, int64_t first_column) {
  const Accumulator& k = g.accumulator;
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.m - first_row));
  const int columns = static_cast<int>(std::min<int64_t>(kColumns, g.n - first_column));
  const T* a_from = static_cast<const T*>(g.a) + (batch * g.m + first_row) * g.k;
  const T* b_from = static_cast<const T*>(g.b) + batch * g.k * g.n + first_column;
  Operands a(static_cast<int64_t>(kRows) * k.chunk), b(static_cast<int64_t>(kColumns) * k.chunk);
  std::vector<float> tree(k.order == Order::kPairwise ? static_cast<size_t>(kColumns) * k.chunk : 0);
  const auto sums = std::make_unique<BlockSums>();
  for (int64_t i = 0; i < g.k; i += k.chunk) {
    const int depth = static_cast<int>(std::min<int64_t>(k.chunk, g.k - i));
    if (depth < k.chunk) {  // the rest of the last chunk is zeros
      std::fill(a.value.begin(), a.value.end(), 0.0f);
      std::fill(b.value.begin(), b.value.end(), 0.0f);
    }
    for (int r = 0; r < rows; ++r) load_all(a.value.data() + r * k.chunk, a_from + r * g.k + i, depth);
    for (int d = 0; d < depth; ++d) load_all(b.value.data() + d * kColumns, b_from + (i + d) * g.n, columns);
    for (Operands* o : {&a, &b}) {
      const int64_t n = static_cast<int64_t>(o->value.size());
      if (k.flush) o->flush(k, n);
      if (k.order != Order::kPairwise) o->split(k, n);
    }
    for (int r = 0; r < rows; ++r) {
      if (k.order == Order::kPairwise)
        add_pairwise(sums->running[r], a, b, r, tree.data(), k);
      else
        add_aligned<Nearest>(sums->running[r], a, b, r, k);
    }
    if (k.promote && (i + k.chunk) % k.promote == 0) sums->promote();
  }
  if (k.promote) sums->promote();
  const auto& result = k.promote ? sums->total : sums->running;
  for (int r = 0; r < rows; ++r) {
    float* to = g.out + (batch * g.m + first_row + r) * g.n + first_column;
    for (int j = 0; j < columns; ++j) to[j] = is_nan(result[r][j]) ? float_of(kNanBits) : result[r][j] + 0.0f;
  }
}

void gemm(const GemmArgs& g) {
  const int64_t row_blocks = (g.m + kRows - 1) / kRows, column_blocks = (g.n + kColumns - 1) / kColumns;
  const bool is_fp32 = g.dtype == Dtype::kFloat32, nearest = g.accumulator.nearest;
  const auto block = is_fp32 ? (nearest ? gemm_block<float, true> : gemm_block<float, false>)
                             : (nearest ? gemm_block<bf16, true> : gemm_block<bf16, false>);
  for_chunks(g.batch * row_blocks * column_blocks, g.threads, [&](int64_t i) {
    block(g, i / (row_blocks * column_blocks), i / column_blocks % row_blocks * kRows, i % column_blocks * kColumns);
  });
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
