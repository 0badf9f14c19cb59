// What all cast loops share: constants of a format, rounding of arrays, random words, and measuring.
#pragma once

#include "../core/hif4.h"
#include "cast_direct.h"
#include "perturb.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kRun = 512;  // values at a time: what they need stays in the first cache
constexpr int kUnit = 32;  // and in the loops of cast_direct.h

// ---- largest magnitude ---------------------------------------------------------------------------------------------

template <class T>
float amax_typed(const T* x, int64_t n, int threads) {
  constexpr int64_t kChunk = 65536;
  constexpr Bits<T> kAbs = static_cast<Bits<T>>(~0u) >> 1;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<uint32_t> parts(chunks, 0);
  for_chunks(chunks, threads, [&](int64_t c) {
    const int64_t last = std::min(n, (c + 1) * kChunk);
    Bits<T> m = 0;
#pragma omp simd reduction(max : m)
    for (int64_t i = c * kChunk; i < last; ++i) m = std::max<Bits<T>>(m, own_bits(x[i]) & kAbs);
    parts[c] = static_cast<uint32_t>(m) << (32 - 8 * sizeof(T));
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

// body(Kind) of an element that is rounded by addition, to nearest or stochastically.
template <class Body>
AQN_HD void with_even(const Element& f, const Body& body) {
  if (is_mirrored(f)) return body(Kind<Rounding::kNearestEven, false, true>());
  return body(Kind<Rounding::kNearestEven, false, false>());
}
template <class Body>
AQN_HD void with_nearest(const Element& f, const Body& body) {
  using R = Rounding;
  const bool mirrored = is_mirrored(f);
  if (f.rounding == R::kNearestEven) return with_even(f, body);
  if (f.tapered) return body(Kind<R::kNearestAway, true, false>());
  return mirrored ? body(Kind<R::kNearestAway, false, true>()) : body(Kind<R::kNearestAway, false, false>());
}
template <class Body>
AQN_HD void with_kind(const Element& f, const Body& body) {
  using R = Rounding;
  if (f.rounding != R::kStochastic) return with_nearest(f, body);
  if (f.tapered) return body(Kind<R::kStochastic, true, false>());
  return is_mirrored(f) ? body(Kind<R::kStochastic, false, true>()) : body(Kind<R::kStochastic, false, false>());
}

// How the values of a format are brought to it: rounded where they are, in a range that is closed or not, scaled by one
// loop, or by arrays.
enum class Way { kClosed, kDirect, kScaled, kAny };

// The scales of neighbours, each its block's, and what they make of the smallest normal number and the limit of a
// direct rounding.
template <class T, int N>
struct Lanes {
  alignas(64) float to_element[N], decode[N];
  alignas(64) Bits<T> low[N], limit[N];
};

// Fills low and limit for n powers of two; false where one leaves the range. Zeros round to zeros with any scale,
// unless what did not count towards it is beside them.
template <class T, int N>
bool scaled_limits(Lanes<T, N>& lanes, const float* scales, const uint32_t* amax, int n, const Spacing k,
                   bool finite_only) {
  const uint32_t zero = finite_only ? ~0u : 0u;
  const uint32_t least = k.least_scale(), span = k.largest_scale() - least;
  uint32_t outside = 0;
#pragma omp simd reduction(| : outside)
  for (int i = 0; i < n; ++i) {
    const uint32_t scale = amax[i] == zero ? Spacing::kOne : bits_of(scales[i]), shift = scale - Spacing::kOne;
    outside |= truth(scale - least > span);
    lanes.low[i] = narrowed<T>(k.low + shift);
    lanes.limit[i] = narrowed<T>(k.max + shift);
  }
  return outside == 0;
}

struct CastConstants {
  Element element;
  Spacing spacing;
  bool by_addition, is_closed;
  Rounder e4m3;
  Scaling scaling;
  TensorScale tensor;
  float tensor_amax;
  bool unscaled, past_caches;
  Draws draws;

  explicit CastConstants(const CastArgs& a)
      : element(a.element),
        spacing(a.element),
        by_addition(rounds_by_addition(a.element)),
        is_closed(a.element.overflow == Overflow::kSaturate && a.element.max == a.element.max_negative &&
                  !a.scaling.finite_only),
        e4m3(e4m3_rounder()),
        scaling(a.scaling),
        tensor(a.scaling, a.tensor_amax),
        tensor_amax(a.tensor_amax),
        unscaled(a.unscaled),
        past_caches(a.batch * a.high * a.wide * (a.dtype == Dtype::kFloat32 ? 4 : 2) >= kStreamFrom),
        draws(a.draws) {}

  // See cast_direct.h. In bfloat16 the limits must be its numbers, scaled or not.
  Way way(Dtype dtype) const {
    if (!by_addition || draws.columns) return Way::kAny;
    const bool elements = scaling.rule == Scale::kNone;
    const bool short_limit = element.max == element.max_negative && (elements || to_bf16(element.max) == element.max);
    if ((dtype == Dtype::kFloat32 || short_limit) &&
        (elements || (scaling.rule == Scale::kPowerOfTwo && !unscaled && !element.tapered)))
      return Way::kDirect;
    return element.rounding == Rounding::kNearestEven ? Way::kScaled : Way::kAny;
  }

  // The same for n blocks of a format that goes by `way`.
  template <class T, int N>
  Way way_of(Way way, Lanes<T, N>& lanes, const float* scales, const uint32_t* amax, int n) const {
    if (way != Way::kDirect) return way;
    if (scaled_limits(lanes, scales, amax, n, spacing, scaling.finite_only))
      return is_closed ? Way::kClosed : Way::kDirect;
    return element.rounding == Rounding::kNearestEven ? Way::kScaled : Way::kAny;
  }

  AQN_HD BlockScale block_scale(uint32_t amax_bits) const {
    if (scaling.rule == Scale::kPowerOfTwo) return e8m0_scale(scaling, amax_bits);
    if (scaling.has_tensor_scale()) return nvfp4_scale(scaling, tensor, e4m3, float_of(amax_bits));
    return fp32_scale(scaling, float_of(amax_bits));
  }

  // The scales of n blocks in lanes: what brings values to the elements, what brings them back, and what is stored.
  void block_scales(float* to_element, float* decoded, float* stored, const uint32_t* amax, int n) const {
    const Rounder e4m3_round = e4m3;
    const TensorScale t = tensor;
    const Scaling k = scaling;
    const auto in_all = [&](const auto& scale_of) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const BlockScale b = scale_of(amax[i]);
        to_element[i] = b.to_element;
        decoded[i] = b.decode;
        stored[i] = b.s;
      }
    };
    if (k.rule == Scale::kPowerOfTwo) {
      in_all([=](uint32_t m) { return e8m0_scale(k, m); });
    } else if (k.rule == Scale::kTwoLevel) {
      in_all([=](uint32_t m) { return two_level_scale(t, e4m3_round, float_of(m) * (t.encode * (1.0f / 6.0f))); });
    } else if (k.has_tensor_scale()) {
      in_all([=](uint32_t m) { return nvfp4_scale(k, t, e4m3_round, float_of(m)); });
    } else {
      in_all([=](uint32_t m) { return fp32_scale(k, float_of(m)); });
    }
    if (unscaled) std::fill_n(decoded, n, 1.0f);
  }
  // The factors after rounding; 1 where the elements themselves are wanted.
  AQN_HD float decode() const { return unscaled ? 1.0f : tensor.decode; }
  AQN_HD float decode(const BlockScale& b) const { return unscaled ? 1.0f : b.decode; }
};

AQN_HD void multiply_all(float* y, const float* x, int n, const float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = x[i] * factor;
}

// Everything is passed by value: the compiler vectorises only what it knows not to change under the loop.
template <Rounding R>
void round_loop(float* y, const float* x, const uint32_t* words, int n, const Grid f) {
  if (words) {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], words[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = rounded<R>(f, x[i], 0u);
  }
}

template <class K>
void space_loop(float* y, const float* x, const uint32_t* words, int n, const Spacing k) {
  if constexpr (K::rounding == Rounding::kStochastic) {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = spaced<K>(k, x[i], k.low, k.max, words[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = spaced<K>(k, x[i], k.low, k.max, 0u);
  }
}

// Any element format, any rounding.
void round_all(float* y, const float* x, const uint32_t* words, int n, const Element& f) {
  if (rounds_by_addition(f))
    return with_kind(f, [&](auto kind) { space_loop<decltype(kind)>(y, x, words, n, Spacing(f)); });
  if (f.is_plain()) {
    const Rounder round(f);
#pragma omp simd
    for (int i = 0; i < n; ++i) y[i] = round(x[i]);
    return;
  }
  const Grid g(f);
  switch (f.rounding) {
    case Rounding::kNearestEven:
      return round_loop<Rounding::kNearestEven>(y, x, words, n, g);
    case Rounding::kNearestAway:
      return round_loop<Rounding::kNearestAway>(y, x, words, n, g);
    case Rounding::kNearestDown:
      return round_loop<Rounding::kNearestDown>(y, x, words, n, g);
    case Rounding::kTowardZero:
      return round_loop<Rounding::kTowardZero>(y, x, words, n, g);
    case Rounding::kUp:
      return round_loop<Rounding::kUp>(y, x, words, n, g);
    case Rounding::kDown:
      return round_loop<Rounding::kDown>(y, x, words, n, g);
    case Rounding::kStochastic:
      return round_loop<Rounding::kStochastic>(y, x, words, n, g);
    case Rounding::kHif8Hybrid:
      return round_loop<Rounding::kHif8Hybrid>(y, x, words, n, g);
  }
}

// What a cast did to n values: x in, y stored, and what was rounded to the element format.
AQN_HD void measure_cast(const float* x, const float* y, const float* scaled, int n, const Element& f, Sums& sums) {
  const float highest = f.max, lowest = -f.max_negative;
  in_lanes(n, [&](int i, int lane) {
    const float before = x[i], after = y[i], rounded = scaled[i];
    const bool finite = is_finite(before) & is_finite(after);  // one Inf must not spoil the sums of all others
    const double from = finite ? before : 0.0f, to = finite ? after : 0.0f, e = to - from;
    sums.error2[lane] += e * e;
    sums.reference2[lane] += from * from;
    sums.changed[lane] += differs(after, before) ? 1 : 0;
    sums.saturated[lane] += (rounded > highest) | (rounded < lowest) ? 1 : 0;
    sums.nonfinite[lane] += is_finite(after) ? 0 : 1;
  });
}

// The random words of n values from `offset` on.
void words_of(uint32_t* words, const Draws& d, int64_t offset, int n) {
  for (int done = 0; done < n;) {
    const int64_t r = (offset + done) / d.columns, c = (offset + done) % d.columns;
    const int64_t id = d.row_ids.pairs ? d.row_ids.at[2 * r] : (d.row_ids.at ? d.row_ids.at[r] : r);
    const int64_t column = c + (d.row_ids.pairs ? d.row_ids.at[2 * r + 1] : 0), skip = column % 4;
    const int count = static_cast<int>(std::min<int64_t>({n - done, d.columns - c, kTile - skip}));
    uint32_t tile[kTile];
    word_tile(tile, column - skip, static_cast<uint64_t>(id), d.key, d.word);
    std::copy_n(tile + skip, count, words + done);
    done += count;
  }
}

// ---- a run of values -----------------------------------------------------------------------------------------------

// Up to kRun neighbours: what becomes of them, and what that measures.
template <class T, bool kMeasure>
class Run {
 public:
  explicit Run(const CastConstants& k) : k_(k), t_(k.decode()), divides_(k.scaling.divides()) {}

  alignas(64) T out[kRun];

  // out = (round(x * to_element) * decode) * t; `offset` is where the values lie in the tensor.
  void scale(const T* from, int n, int64_t offset, const float* to_element, const float* decode) {
    load_all(x_, from, n);
    bring(n, to_element);
    if (k_.draws.columns) words_of(words_, k_.draws, offset, n);
    round_all(y_, scaled_, words_, n, k_.element);
    const float t = t_;
#pragma omp simd
    for (int i = 0; i < n; ++i) y_[i] = (y_[i] * decode[i]) * t;
    store_all(out, y_, n);
  }

  // The same by body(to, from, i) for kUnit values from i on.
  template <class Body>
  void in_units(const T* from, int n, const Body& body) {
    int i = 0;
    for (; i + kUnit <= n; i += kUnit) body(out + i, from + i, i);
    if (i == n) return;
    T padded[kUnit] = {};
    std::copy(from + i, from + n, padded);
    body(out + i, padded, i);
  }

  void finish(T* to, const T* from, int n, const float* to_element, Sums& sums) {
    if (kMeasure) measure(from, n, to_element, sums);
    copy_out(to, out, n * sizeof(T), k_.past_caches);
  }

 private:
  void measure(const T* from, int n, const float* to_element, Sums& sums) {
    int i = 0;
#if defined(__AVX512F__)
    const float highest = k_.element.max, lowest = -k_.element.max_negative;
    while (!divides_ && i + kMeasured <= n &&
           measure_cast_tile(from + i, out + i, to_element + i, highest, lowest, sums))
      i += kMeasured;
#endif
    if (i == n) return;
    load_all(x_, from + i, n - i);
    load_all(y_, out + i, n - i);
    bring(n - i, to_element + i);
    measure_cast(x_, y_, scaled_, n - i, k_.element, sums);
  }

  void bring(int n, const float* to_element) {
    if (divides_) {
#pragma omp simd
      for (int i = 0; i < n; ++i) scaled_[i] = x_[i] / to_element[i];
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) scaled_[i] = x_[i] * to_element[i];
    }
  }

  const CastConstants& k_;
  float t_;
  bool divides_;
  alignas(64) float x_[kRun], y_[kRun], scaled_[kRun];
  alignas(64) uint32_t words_[kRun];
};

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
