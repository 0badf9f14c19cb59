// Casts to block formats whose scale depends on all values of a block: one at a time is gathered, scaled, rounded and
// scattered.
#pragma once

#include "cast_shared.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// One block of rows x columns at a time, gathered into local memory: the tail of a tile is zeros, as the rules have it.
class Block {
 public:
  explicit Block(const CastArgs& a)
      : k_(a), columns_(a.scaling.columns ? a.scaling.columns : std::max<int64_t>(a.wide, 1)) {
    size_ = static_cast<int>(a.scaling.rows * columns_);
    for (std::vector<float>* v : {&x, &y, &scaled_, &trial_}) v->resize(size_);
    words.resize(a.draws.columns ? size_ : 0);
  }

  std::vector<float> x, y;
  std::vector<uint32_t> words;
  int columns() const { return static_cast<int>(columns_); }

  // From x to y; returns the bits that are stored as the block's scale.
  uint32_t cast(float t) {
    if (k_.scaling.rule == Scale::kHif4) return cast_hif4();
    const BlockScale b = scale();
    bring(scaled_.data(), b.to_element);
    round_all(y.data(), scaled_.data(), words.empty() ? nullptr : words.data(), size_, k_.element);
    const float s = k_.decode(b);
#pragma omp simd
    for (int i = 0; i < size_; ++i) y[i] = (y[i] * s) * t;
    return bits_of(b.s);
  }

  const float* scaled() const { return scaled_.data(); }

 private:
  void bring(float* to, float factor) const {
    if (k_.scaling.divides()) {
#pragma omp simd
      for (int i = 0; i < size_; ++i) to[i] = x[i] / factor;
    } else {
      multiply_all(to, x.data(), size_, factor);
    }
  }

  BlockScale scale() {
    const uint32_t amax = k_.scaling.finite_only ? largest_finite_bits(x.data(), size_) : largest_bits(x.data(), size_);
    if (k_.scaling.rule == Scale::kLeastError) return least_error(amax);
    if (k_.scaling.searches()) return four_over_six(float_of(amax));
    return k_.block_scale(amax);
  }

  // Errors of the block added up in fp32: each row from left to right, then rows pairwise, first half and second.
  template <class Error>
  float error_sum(const Error& error) const {
    const int rows = k_.scaling.rows;
    int half = 1;
    while (half < rows) half *= 2;
    std::vector<float> sums(half, 0.0f);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns(); ++c) sums[r] += error(static_cast<int>(r * columns_) + c);
    while (half > 1) {
      half /= 2;
      for (int r = 0; r < half; ++r) sums[r] = sums[r] + sums[r + half];
    }
    return sums[0];
  }

  void try_elements(float factor) {  // nearest even, into trial_
    Element nearest = k_.element;
    nearest.rounding = Rounding::kNearestEven;
    bring(scaled_.data(), factor);
    if (k_.scaling.finite_only)
      for (int i = 0; i < size_; ++i) scaled_[i] = is_finite(x[i]) ? scaled_[i] : 0.0f;
    round_all(trial_.data(), scaled_.data(), nullptr, size_, nearest);
  }

  // The exponent of floor, one more or one less: the first whose squared error is least.
  BlockScale least_error(uint32_t amax) {
    if (amax == 0 || amax >= kInfBits) return e8m0_scale(k_.scaling, amax);
    const int e0 = e8m0_exponent(k_.scaling, amax);
    const int floor = e0 < -127 ? -127 : (e0 > 127 ? 127 : e0);
    BlockScale best = {};
    float least = 0.0f;
    for (const int shift : {0, 1, -1}) {
      const int e = floor + shift < -127 ? -127 : (floor + shift > 127 ? 127 : floor + shift);
      const BlockScale b = power_of_two(e);
      try_elements(b.to_element);
      const float error = error_sum([&](int i) {
                            const float off = trial_[i] - scaled_[i];
                            return off * off;
                          }) *
                          exp2_of(2 * (e - floor));
      if (shift == 0 || error < least) {
        best = b;
        least = error;
      }
    }
    return best;
  }

  // NVIDIA TransformerEngine's 4over6: the largest value goes to 6 or, with a scale 1.5 times as large, to 4.
  BlockScale four_over_six(float amax) {
    const TensorScale& t = k_.tensor;
    const float base = (amax / 6.0f) * t.encode;
    const auto candidate = [&](float wanted, float& error) {
      const BlockScale b = two_level_scale(t, k_.e4m3, wanted);
      try_elements(b.to_element);
      const float tensor_amax = k_.tensor_amax, largest = k_.scaling.largest;
      const bool squared = k_.scaling.rule == Scale::kFourOverSixMse;
      error = error_sum([&](int i) {
        const float off = ((trial_[i] * b.s) * tensor_amax) / largest - x[i];
        return squared ? off * off : abs_of(off);
      });
      return b;
    };
    float error6, error4;
    const BlockScale six = candidate(base, error6), four = candidate(base * 1.5f, error4);
    return error4 < error6 ? four : six;
  }

  uint32_t cast_hif4() {
    uint32_t of4[16];
    for (int g = 0; g < 16; ++g) of4[g] = largest_bits(x.data() + 4 * g, 4);
    const Hif4 h = hif4_scales(of4);
    for (int i = 0; i < 64; ++i) scaled_[i] = hif4_scaled(h, h.shift(i / 4), x[i]);
    round_all(y.data(), scaled_.data(), words.empty() ? nullptr : words.data(), size_, k_.element);
    if (!k_.unscaled)
      for (int i = 0; i < 64; ++i) y[i] = y[i] * hif4_decode(h, h.shift(i / 4));
    return h.levels;
  }

  CastConstants k_;
  int64_t columns_;
  int size_;
  std::vector<float> scaled_, trial_;
};

template <class T, bool Measure>
Stats cast_blocks(const CastArgs& a) {
  const int64_t rows = a.scaling.rows, columns = a.scaling.columns ? a.scaling.columns : std::max<int64_t>(a.wide, 1);
  const int64_t down = (a.high + rows - 1) / rows, across = (a.wide + columns - 1) / columns;
  const int64_t step_row = a.row_major ? a.wide : 1, step_column = a.row_major ? 1 : a.high;
  const int64_t all = a.batch * down * across, per_chunk = std::max<int64_t>(1, 16384 / (rows * columns));
  const int64_t chunks = (all + per_chunk - 1) / per_chunk;
  const float t = CastConstants(a).decode();
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    Block block(a);
    std::vector<float> after(Measure ? block.columns() : 0);
    const int64_t last = std::min(all, (c + 1) * per_chunk);
    for (int64_t i = c * per_chunk; i < last; ++i) {
      // Blocks are numbered as their scales lie in memory.
      const int64_t inner = a.row_major ? across : down;
      const int64_t first = (i / inner) % (a.row_major ? down : across), second = i % inner;
      const int64_t row = (a.row_major ? first : second) * rows, column = (a.row_major ? second : first) * columns;
      const int64_t batch = i / (down * across);
      const int64_t at = batch * a.high * a.wide + row * step_row + column * step_column;
      const T* from = static_cast<const T*>(a.x) + at;
      T* to = static_cast<T*>(a.y) + at;
      const int height = static_cast<int>(std::min(rows, a.high - row));
      const int width = static_cast<int>(std::min(columns, a.wide - column));
      if (height < rows || width < columns) std::fill(block.x.begin(), block.x.end(), 0.0f);
      for (int r = 0; r < height; ++r) {
        float* x = block.x.data() + r * columns;
        const T* line = from + r * step_row;
        if (step_column == 1) {
          load_all(x, line, width);
        } else {
          for (int j = 0; j < width; ++j) x[j] = load(line[j * step_column]);
        }
        if (a.draws.columns)
          for (int j = 0; j < width; j += a.row_major ? width : 1)
            words_of(block.words.data() + r * columns + j, a.draws, at + r * step_row + j * step_column,
                     a.row_major ? width : 1);
      }
      const uint32_t scale = block.cast(t);
      if (a.scales) static_cast<uint32_t*>(a.scales)[i] = scale;
      for (int r = 0; r < height; ++r) {
        const float* y = block.y.data() + r * columns;
        T* line = to + r * step_row;
        if (step_column == 1) {
          store_all(line, y, width);
        } else {
          for (int j = 0; j < width; ++j) store(line + j * step_column, y[j]);
        }
        if (Measure) {
          for (int j = 0; j < width; ++j) after[j] = load(line[j * step_column]);
          measure_cast(block.x.data() + r * columns, after.data(), block.scaled() + r * columns, width, a.element,
                       sums);
        }
      }
      count += static_cast<int64_t>(height) * width;
    }
    if (Measure) sums.flush(parts[c], count);
  });
  return total(parts);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
