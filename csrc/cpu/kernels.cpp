// The CPU kernels, compiled once for each instruction set (AQN_ISA names it). Written so that the compiler vectorises
// the inner loops: fixed trip counts over small local arrays, no branches on data.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/normal.h"
#include "../core/philox.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kLanes = 16;

// Float partial sums in lanes, flushed into doubles before they grow long.
struct Sums {
  float error2[kLanes] = {}, reference2[kLanes] = {}, injected2[kLanes] = {};
  int32_t changed[kLanes] = {}, saturated[kLanes] = {}, nonfinite[kLanes] = {}, injected_n[kLanes] = {};

  void flush(Stats& s, int64_t count) {
    s.count += static_cast<double>(count);
    for (int j = 0; j < kLanes; ++j) {
      s.error2 += error2[j];
      s.reference2 += reference2[j];
      s.injected2 += injected2[j];
      s.changed += changed[j];
      s.saturated += saturated[j];
      s.nonfinite += nonfinite[j];
      s.injected_n += injected_n[j];
    }
    *this = Sums();
  }
};

Stats total(const std::vector<Stats>& parts) {
  Stats t;
  for (const Stats& p : parts) {
    t.count += p.count;
    t.changed += p.changed;
    t.error2 += p.error2;
    t.reference2 += p.reference2;
    t.injected2 += p.injected2;
    t.injected_n += p.injected_n;
    t.saturated += p.saturated;
    t.nonfinite += p.nonfinite;
  }
  return t;
}

template <class T>
AQN_HD void load_all(float* to, const T* from, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class T>
AQN_HD void store_all(T* to, const float* from, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) store(to + i, from[i]);
}

template <class Body>
void for_chunks(int64_t chunks, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) body(c);
}

// ---- cast ----------------------------------------------------------------------------------------------------------

struct CastConstants {
  Rounder element, e4m3;
  TwoLevel two_level;
  Scale scale;
  int emax;
  bool unscaled;

  explicit CastConstants(const CastArgs& a)
      : element(a.element),
        e4m3(Element{3, -6, 448.0f, Overflow::kSaturate}),
        two_level(a.tensor_amax),
        scale(a.scale),
        emax(a.emax),
        unscaled(a.unscaled) {}

  AQN_HD BlockScale block_scale(uint32_t amax_bits) const {
    if (scale == Scale::kE8M0Floor) return mx_floor_scale(amax_bits, emax);
    if (scale == Scale::kE4M3TwoLevel) return two_level.block(float_of(amax_bits), e4m3);
    return {1.0f, 1.0f};
  }
  AQN_HD void block_scales(float* to_element, float* s, const uint32_t* amax, int n) const {
    const Rounder round = e4m3;
    const TwoLevel level = two_level;
    const int largest = emax;
    if (scale == Scale::kE8M0Floor) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = mx_floor_scale(amax[i], largest);
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = level.block(float_of(amax[i]), round);
        to_element[i] = b.to_element;
        s[i] = b.s;
      }
    }
  }
  // The factors after rounding; 1 where the elements themselves are wanted.
  AQN_HD float decode() const { return scale == Scale::kE4M3TwoLevel && !unscaled ? two_level.decode : 1.0f; }
  AQN_HD float decode(const BlockScale& b) const { return unscaled ? 1.0f : b.s; }
};

AQN_HD uint32_t largest_bits(const float* x, int n) {
  uint32_t m = 0;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) m = std::max(m, bits_of(x[i]) & kAbsMask);
  return m;
}

// y = (round(x * to_element) * s) * t. The second factor t is 1 except for two-level scales: multiplying by it is exact
// then. Everything is passed by value: the compiler vectorises only what it knows not to change under the loop.
AQN_HD void cast_all(float* y, const float* x, int n, const Rounder round, const float to_element, const float s,
                     const float t) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = (round(x[i] * to_element) * s) * t;
}

// What a cast did to n values: x in, y stored, each brought to the element format by its factor.
AQN_HD void measure_cast(const float* x, const float* y, const float* to_element, int n, float max, Sums& sums) {
  for (int i = 0; i < n; i += kLanes) {
    const int lanes = std::min(kLanes, n - i);
#pragma omp simd
    for (int j = 0; j < lanes; ++j) {
      const float e = y[i + j] - x[i + j];
      const bool finite = is_finite(e);  // one Inf must not spoil the sums of all others
      sums.error2[j] += finite ? e * e : 0.0f;
      sums.reference2[j] += finite ? x[i + j] * x[i + j] : 0.0f;
      sums.changed[j] += differs(y[i + j], x[i + j]) ? 1 : 0;
      sums.saturated[j] += abs_of(x[i + j] * to_element[i + j]) > max ? 1 : 0;
      sums.nonfinite[j] += is_finite(y[i + j]) ? 0 : 1;
    }
  }
}

constexpr int kMaxBlock = 256;  // the longest block that fits the local buffers

// Blocks of any length along rows whose last block may be shorter.
template <class T, bool Measure>
Stats cast_contiguous(const CastArgs& a) {
  const CastConstants k(a);
  const float t = k.decode();
  const int64_t blocks = (a.n + a.block - 1) / a.block;
  const int64_t per_chunk = std::max<int64_t>(1, 16384 / a.block);
  const int64_t all = a.outer * blocks, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    int64_t count = 0;
    const int64_t last = std::min(all, (c + 1) * per_chunk);
    for (int64_t i = c * per_chunk; i < last; ++i) {
      const int64_t start = (i % blocks) * a.block, at = (i / blocks) * a.n + start;
      const int n = static_cast<int>(std::min(a.block, a.n - start));
      T* to = static_cast<T*>(a.y) + at;
      float x[kMaxBlock], y[kMaxBlock], factor[kMaxBlock];
      load_all(x, static_cast<const T*>(a.x) + at, n);
      const BlockScale b = k.block_scale(largest_bits(x, n));
      if (a.scales) a.scales[i] = b.s;
      cast_all(y, x, n, k.element, b.to_element, k.decode(b), t);
      store_all(to, y, n);
      if (Measure) {
        load_all(y, to, n);
        std::fill_n(factor, n, b.to_element);
        measure_cast(x, y, factor, n, k.element.max, sums);
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
  const int64_t all = a.outer * (a.n / N), per_chunk = 16384 / N, chunks = (all + per_chunk - 1) / per_chunk;
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
      if (a.scales) std::copy_n(s, batch, a.scales + i);
      for (int b = 0; b < batch; ++b) {
        cast_all(y + b * N, x + b * N, N, k.element, factor[b], k.unscaled ? 1.0f : s[b], t);
        store_all(to + b * N, y + b * N, N);
      }
      if (Measure) {
        float spread[kSize];
        for (int b = 0; b < batch; ++b) std::fill_n(spread + b * N, N, factor[b]);
        load_all(y, to, batch * N);
        measure_cast(x, y, spread, batch * N, k.element.max, sums);
      }
    }
    if (Measure) sums.flush(parts[c], (last - first) * N);
  });
  return total(parts);
}

// Blocks along an axis whose neighbours lie `inner` apart: tiles of columns, each with its own running maximum.
template <class T, bool Measure>
Stats cast_strided(const CastArgs& a) {
  constexpr int kTile = 64;
  const CastConstants k(a);
  const float t = k.decode();
  const int64_t blocks = (a.n + a.block - 1) / a.block, tiles = (a.inner + kTile - 1) / kTile;
  const int64_t chunks = a.outer * blocks * tiles;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    const int64_t tile = c % tiles, block = (c / tiles) % blocks, outer = c / (tiles * blocks);
    const int64_t column = tile * kTile, start = block * a.block;
    const int width = static_cast<int>(std::min<int64_t>(kTile, a.inner - column));
    const int64_t length = std::min(a.block, a.n - start);
    const int64_t at = (outer * a.n + start) * a.inner + column;
    const T* from = static_cast<const T*>(a.x) + at;
    T* to = static_cast<T*>(a.y) + at;
    uint32_t amax[kTile] = {};
    for (int64_t i = 0; i < length; ++i)
#pragma omp simd
      for (int j = 0; j < width; ++j) amax[j] = std::max(amax[j], bits_of(load(from[i * a.inner + j])) & kAbsMask);
    float factor[kTile], s[kTile];
    for (int j = 0; j < width; ++j) {
      const BlockScale b = k.block_scale(amax[j]);
      factor[j] = b.to_element;
      s[j] = k.decode(b);
      if (a.scales) a.scales[(outer * blocks + block) * a.inner + column + j] = b.s;
    }
    const Rounder round = k.element;
    Sums sums;
    float x[kTile], y[kTile];
    for (int64_t i = 0; i < length; ++i) {
      load_all(x, from + i * a.inner, width);
#pragma omp simd
      for (int j = 0; j < width; ++j) y[j] = (round(x[j] * factor[j]) * s[j]) * t;
      store_all(to + i * a.inner, y, width);
      if (Measure) {
        load_all(y, to + i * a.inner, width);
        measure_cast(x, y, factor, width, k.element.max, sums);
      }
    }
    if (Measure) sums.flush(parts[c], length * width);
  });
  return total(parts);
}

// Every element for itself.
template <class T, bool Measure>
Stats cast_elements(const CastArgs& a) {
  constexpr int kSize = 256;
  const Rounder round(a.element);
  const int64_t all = a.outer * a.n * a.inner, per_chunk = 16384, chunks = (all + per_chunk - 1) / per_chunk;
  std::vector<Stats> parts(Measure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    const int64_t first = c * per_chunk, last = std::min(all, first + per_chunk);
    float x[kSize], y[kSize], ones[kSize];
    std::fill_n(ones, kSize, 1.0f);
    for (int64_t i = first; i < last; i += kSize) {
      const int n = static_cast<int>(std::min<int64_t>(kSize, last - i));
      T* to = static_cast<T*>(a.y) + i;
      load_all(x, static_cast<const T*>(a.x) + i, n);
      cast_all(y, x, n, round, 1.0f, 1.0f, 1.0f);
      store_all(to, y, n);
      if (Measure) {
        load_all(y, to, n);
        measure_cast(x, y, ones, n, round.max, sums);
      }
    }
    if (Measure) sums.flush(parts[c], last - first);
  });
  return total(parts);
}

template <class T, bool Measure>
Stats cast_typed(const CastArgs& a) {
  if (a.scale == Scale::kNone) return cast_elements<T, Measure>(a);
  if (a.inner > 1) return cast_strided<T, Measure>(a);
  if (a.block == 32 && a.n % 32 == 0) return cast_whole_blocks<T, Measure, 32>(a);
  if (a.block == 16 && a.n % 16 == 0) return cast_whole_blocks<T, Measure, 16>(a);
  return cast_contiguous<T, Measure>(a);
}

Stats cast(const CastArgs& a, bool measure) {
  if (a.outer == 0 || a.n == 0 || a.inner == 0) return {};
  if (a.dtype == Dtype::kFloat32) return measure ? cast_typed<float, true>(a) : cast_typed<float, false>(a);
  return measure ? cast_typed<bf16, true>(a) : cast_typed<bf16, false>(a);
}

// ---- largest magnitude
// -----------------------------------------------------------------------------------------------

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

// ---- perturb
// ---------------------------------------------------------------------------------------------------------

constexpr int kCounters = 32;         // Philox blocks at a time
constexpr int kTile = 4 * kCounters;  // and the columns that they serve

// The standard normals of columns [column, column + kTile) of one logical row; column is a multiple of 4.
AQN_HD void normal_tile(float* z, int64_t column, uint64_t row, uint64_t key, uint32_t step) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  const uint32_t first = static_cast<uint32_t>(column / 4);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) {
    c0[j] = first + static_cast<uint32_t>(j);
    c1[j] = static_cast<uint32_t>(row);
    c2[j] = static_cast<uint32_t>(row >> 32);
    c3[j] = step;
    philox4x32_10(c0[j], c1[j], c2[j], c3[j], static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  }
  float z0[kCounters], z1[kCounters], z2[kCounters], z3[kCounters];
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c0[j], c1[j], z0[j], z1[j]);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) box_muller(c2[j], c3[j], z2[j], z3[j]);
#pragma omp simd
  for (int j = 0; j < kCounters; ++j) {
    z[4 * j] = z0[j];
    z[4 * j + 1] = z1[j];
    z[4 * j + 2] = z2[j];
    z[4 * j + 3] = z3[j];
  }
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

}  // namespace

extern const Kernels table;
const Kernels table = {AQN_ISA_NAME, cast, perturb, amax, normal};

}  // namespace aqn::cpu::AQN_ISA
