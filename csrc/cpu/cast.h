// Casts. Formats with IEEE-like elements, rounding to nearest even and a scale that depends on the block's largest
// value alone have loops of their own; everything else goes block by block through one general loop.
#pragma once

#include "../core/hif4.h"
#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// ---- largest magnitude ---------------------------------------------------------------------------------------------

template <class T>
float amax_typed(const T* x, int64_t n, int threads) {
  constexpr int64_t kChunk = 65536;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<uint32_t> parts(chunks, 0);
  for_chunks(chunks, threads, [&](int64_t c) {
    const int64_t last = std::min(n, (c + 1) * kChunk);
    uint32_t m = 0;
    for (int64_t i = c * kChunk; i < last; ++i) m = std::max(m, bits_of(load(x[i])) & kAbsMask);
    parts[c] = m;
  });
  uint32_t m = 0;
  for (const uint32_t p : parts) m = std::max(m, p);  // NaN has the largest bits: it survives
  return float_of(m);
}

float amax(const void* x, Dtype dtype, int64_t n, int threads) {
  return dtype == Dtype::kFloat32 ? amax_typed(static_cast<const float*>(x), n, threads)
                                  : amax_typed(static_cast<const bf16*>(x), n, threads);
}

AQN_HD uint32_t largest_bits(const float* x, int n) {
  uint32_t m = 0;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) m = std::max(m, bits_of(x[i]) & kAbsMask);
  return m;
}

AQN_HD uint32_t largest_finite_bits(const float* x, int n) {
  uint32_t m = 0;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]) & kAbsMask;
    m = std::max(m, bits < kInfBits ? bits : 0u);
  }
  return m;
}

// ---- what all loops share ------------------------------------------------------------------------------------------

struct CastConstants {
  Element element;
  Rounder round, e4m3;
  Scaling scaling;
  TensorScale tensor;
  bool unscaled;

  explicit CastConstants(const CastArgs& a)
      : element(a.element),
        round(a.element),
        e4m3(e4m3_rounder()),
        scaling(a.scaling),
        tensor(a.scaling, a.tensor_amax),
        unscaled(a.unscaled) {}

  AQN_HD BlockScale block_scale(uint32_t amax_bits) const {
    if (scaling.rule == Scale::kPowerOfTwo) return e8m0_scale(scaling, amax_bits);
    if (scaling.has_tensor_scale()) return nvfp4_scale(scaling, tensor, e4m3, float_of(amax_bits));
    return fp32_scale(scaling, float_of(amax_bits));
  }
  AQN_HD void block_scales(float* to_element, float* s, const uint32_t* amax, int n) const {
    const Rounder e4m3_round = e4m3;
    const TensorScale t = tensor;
    const Scaling k = scaling;
    if (k.rule == Scale::kPowerOfTwo) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = e8m0_scale(k, amax[i]);
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = two_level_scale(t, e4m3_round, float_of(amax[i]) * (t.encode * (1.0f / 6.0f)));
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    }
  }
  // The factors after rounding; 1 where the elements themselves are wanted.
  AQN_HD float decode() const { return unscaled ? 1.0f : tensor.decode; }
  AQN_HD float decode(const BlockScale& b) const { return unscaled ? 1.0f : b.decode; }
};

// y = (round(x * to_element) * s) * t. The second factor t is 1 except for two-level scales: multiplying by it is exact
// then. Everything is passed by value: the compiler vectorises only what it knows not to change under the loop.
AQN_HD void cast_all(float* y, const float* x, int n, const Rounder round, const float to_element, const float s,
                     const float t) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = (round(x[i] * to_element) * s) * t;
}

AQN_HD void multiply_all(float* y, const float* x, int n, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = x[i] * factor;
}

template <Rounding R>
void round_loop(float* y, const float* x, const uint32_t* words, int n, const Element f) {
  if (words) {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], words[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], 0u);
  }
}

// Any element format, any rounding.
void round_all(float* y, const float* x, const uint32_t* words, int n, const Element& f) {
  switch (f.rounding) {
    case Rounding::kNearestEven:
      return round_loop<Rounding::kNearestEven>(y, x, words, n, f);
    case Rounding::kNearestAway:
      return round_loop<Rounding::kNearestAway>(y, x, words, n, f);
    case Rounding::kNearestDown:
      return round_loop<Rounding::kNearestDown>(y, x, words, n, f);
    case Rounding::kTowardZero:
      return round_loop<Rounding::kTowardZero>(y, x, words, n, f);
    case Rounding::kUp:
      return round_loop<Rounding::kUp>(y, x, words, n, f);
    case Rounding::kDown:
      return round_loop<Rounding::kDown>(y, x, words, n, f);
    case Rounding::kStochastic:
      return round_loop<Rounding::kStochastic>(y, x, words, n, f);
    case Rounding::kHif8Hybrid:
      return round_loop<Rounding::kHif8Hybrid>(y, x, words, n, f);
  }
}

// What a cast did to n values: x in, y stored, and what was rounded to the element format.
AQN_HD void measure_cast(const float* x, const float* y, const float* scaled, int n, const Element& f, Sums& sums) {
  const float highest = f.max, lowest = -f.max_negative;
  for (int i = 0; i < n; i += kLanes) {
    const int lanes = std::min(kLanes, n - i);
#pragma omp simd
    for (int j = 0; j < lanes; ++j) {
      const float e = y[i + j] - x[i + j];
      const bool finite = is_finite(e);  // one Inf must not spoil the sums of all others
      sums.error2[j] += finite ? e * e : 0.0f;
      sums.reference2[j] += finite ? x[i + j] * x[i + j] : 0.0f;
      sums.changed[j] += differs(y[i + j], x[i + j]) ? 1 : 0;
      sums.saturated[j] += scaled[i + j] > highest || scaled[i + j] < lowest ? 1 : 0;
      sums.nonfinite[j] += is_finite(y[i + j]) ? 0 : 1;
    }
  }
}

// ---- plain elements, blocks along the last axis --------------------------------------------------------------------

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

// ---- every element for itself --------------------------------------------------------------------------------------

// No scale, or one for the whole tensor.
template <class T, bool Measure>
Stats cast_elements(const CastArgs& a) {
  constexpr int kSize = 256;
  const CastConstants k(a);
  BlockScale b = {1.0f, 1.0f, 1.0f};
  if (a.scaling.rule != Scale::kNone) b = fp32_scale(a.scaling, a.tensor_amax);
  if (a.scales) static_cast<float*>(a.scales)[0] = b.s;
  const bool plain = a.element.is_plain(), divides = a.scaling.divides();
  const float decode = k.decode(b);
  const int64_t all = a.batch * a.high * a.wide, per_chunk = 16384, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    const int64_t first = c * per_chunk, last = std::min(all, first + per_chunk);
    float x[kSize], y[kSize], scaled[kSize];
    for (int64_t i = first; i < last; i += kSize) {
      const int n = static_cast<int>(std::min<int64_t>(kSize, last - i));
      T* to = static_cast<T*>(a.y) + i;
      load_all(x, static_cast<const T*>(a.x) + i, n);
      if (plain && !divides) {
        cast_all(y, x, n, k.round, b.to_element, decode, 1.0f);
        if (Measure) multiply_all(scaled, x, n, b.to_element);
      } else {
#pragma omp simd
        for (int j = 0; j < n; ++j) scaled[j] = divides ? x[j] / b.to_element : x[j] * b.to_element;
        round_all(y, scaled, a.words ? a.words + i : nullptr, n, k.element);
        multiply_all(y, y, n, decode);
      }
      store_all(to, y, n);
      if (Measure) {
        load_all(y, to, n);
        measure_cast(x, y, scaled, n, k.element, sums);
      }
    }
    if (Measure) sums.flush(parts[c], last - first);
  });
  return total(parts);
}

// ---- any block format ----------------------------------------------------------------------------------------------

// One block of rows x columns at a time, gathered into local memory: the tail of a tile is zeros, as the rules have it.
class Block {
 public:
  explicit Block(const CastArgs& a)
      : k_(a), columns_(a.scaling.columns ? a.scaling.columns : std::max<int64_t>(a.wide, 1)) {
    size_ = static_cast<int>(a.scaling.rows * columns_);
    for (std::vector<float>* v : {&x, &y, &scaled_, &trial_}) v->resize(size_);
    words.resize(a.words ? size_ : 0);
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
      const float tensor_amax = tensor_amax_, largest = k_.scaling.largest;
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

 public:
  void set_tensor_amax(float amax) { tensor_amax_ = amax; }

 private:
  CastConstants k_;
  int64_t columns_;
  int size_;
  float tensor_amax_ = 0.0f;
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
    block.set_tensor_amax(a.tensor_amax);
    std::vector<float> before, after, reached;
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
        if (a.words)
          for (int j = 0; j < width; ++j) block.words[r * columns + j] = a.words[at + r * step_row + j * step_column];
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
          after.resize(width);
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

// ---- dispatch ------------------------------------------------------------------------------------------------------

bool has_own_loop(const CastArgs& a) {
  const Scaling& s = a.scaling;
  return a.element.is_plain() && s.rows == 1 && s.columns >= 1 && s.columns <= kMaxBlock && !s.finite_only &&
         (s.rule == Scale::kPowerOfTwo || s.rule == Scale::kTwoLevel);
}

template <class T, bool Measure>
Stats cast_typed(const CastArgs& a) {
  if (a.scaling.rule == Scale::kNone || a.scaling.rows == 0) return cast_elements<T, Measure>(a);
  if (!has_own_loop(a)) return cast_blocks<T, Measure>(a);
  if (a.high > 1) return cast_strided<T, Measure>(a);
  if (a.scaling.columns == 32 && a.wide % 32 == 0) return cast_whole_blocks<T, Measure, 32>(a);
  if (a.scaling.columns == 16 && a.wide % 16 == 0) return cast_whole_blocks<T, Measure, 16>(a);
  return cast_contiguous<T, Measure>(a);
}

Stats cast(const CastArgs& a, bool measure) {
  if (a.batch == 0 || a.high == 0 || a.wide == 0) {
    if (a.scaling.rule != Scale::kNone && a.scaling.rows == 0 && a.scales)
      static_cast<float*>(a.scales)[0] = fp32_scale(a.scaling, 0.0f).s;
    return {};
  }
  if (a.dtype == Dtype::kFloat32) return measure ? cast_typed<float, true>(a) : cast_typed<float, false>(a);
  return measure ? cast_typed<bf16, true>(a) : cast_typed<bf16, false>(a);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
