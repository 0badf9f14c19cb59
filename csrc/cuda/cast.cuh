// Casts. `Spec` has the format as literals, Spec::element() and Spec::scaling(), so that a compiled kernel holds those
// instructions alone that its format needs. Spec::kWholeDraws: 16 bytes of values draw whole Philox blocks.
//
// cast_elements  no scale, or one for the tensor; 16 bytes at a time
// cast_rows      blocks of N along contiguous rows, scaled by their largest value: a few lanes hold a block, 16 bytes
// each cast_held      a thread holds a block of up to N: blocks across rows, and rules that look at all values of a
// block cast_team      any other block: a warp or a whole block of threads walks over it
#pragma once

#include "../core/hif4.h"
#include "measure.cuh"
#include "noise.cuh"

namespace aqn::cuda {

// A contiguous tensor seen as [batch, high, wide] matrices; blocks lie along `wide`.
struct CastArgs {
  const void* x;
  void* y;
  void* scales;          // optional: one fp32 value (for HiF4, 32 bits of levels) a block, as the blocks lie in memory
  const uint32_t* amax;  // for a scale of the tensor: the bits of its largest magnitude
  double* parts;         // of measured kernels
  RowIds rows;           // of stochastic rounding, as are the next three
  Clock clock;
  uint64_t key;
  int64_t columns;  // of the tensor's last axis
  int64_t batch, high, wide;
  int64_t row_major;  // whether neighbours along `wide` are neighbours in memory; else those along `high` are
};

enum class Mode : int { kPlain = 0, kMeasured = 1, kUnscaled = 2 };  // kUnscaled: store the elements q, and the scales

// Any element format, any rounding. The format is made of literals: one case is left of the switch.
AQN_DEVICE float round_to(const Element& e, float x, uint32_t word) {
  if (e.is_plain()) return Rounder(e)(x);
  const Grid g(e);
  switch (e.rounding) {
    case Rounding::kNearestEven:
      return rounded<Rounding::kNearestEven>(g, x, word);
    case Rounding::kNearestAway:
      return rounded<Rounding::kNearestAway>(g, x, word);
    case Rounding::kNearestDown:
      return rounded<Rounding::kNearestDown>(g, x, word);
    case Rounding::kTowardZero:
      return rounded<Rounding::kTowardZero>(g, x, word);
    case Rounding::kUp:
      return rounded<Rounding::kUp>(g, x, word);
    case Rounding::kDown:
      return rounded<Rounding::kDown>(g, x, word);
    case Rounding::kStochastic:
      return rounded<Rounding::kStochastic>(g, x, word);
    case Rounding::kHif8Hybrid:
      return rounded<Rounding::kHif8Hybrid>(g, x, word);
  }
  return x;
}

// A format's arithmetic on one value or block.
template <class Spec, class T, Mode M>
class Caster {
 public:
  AQN_DEVICE explicit Caster(const CastArgs& a)
      : a_(a),
        amax_(has_amax() ? float_of(*a.amax) : 0.0f),
        tensor_(Spec::scaling(), amax_),
        stream_(a.key, draws() ? a.clock.read() : 0, Draw::kPerPhase, 0) {}

  AQN_DEVICE static bool draws() { return Spec::element().rounding == Rounding::kStochastic; }

  AQN_DEVICE static bool has_amax() {
    const Scaling k = Spec::scaling();
    return k.has_tensor_scale() || (k.rule != Scale::kNone && k.rows == 0);
  }

  AQN_DEVICE BlockScale scale_of(uint32_t amax_bits) const {
    const Scaling k = Spec::scaling();
    if (k.rule == Scale::kNone) return {1.0f, 1.0f, 1.0f};
    if (k.rule == Scale::kPowerOfTwo || k.rule == Scale::kLeastError) return e8m0_scale(k, amax_bits);
    if (k.has_tensor_scale()) return nvfp4_scale(k, tensor_, e4m3_rounder(), float_of(amax_bits));
    return fp32_scale(k, float_of(amax_bits));
  }
  AQN_DEVICE BlockScale tensor_scale() const { return scale_of(bits_of(amax_)); }

  // The bits of a magnitude that counts towards the scale.
  AQN_DEVICE static uint32_t counted(float x) {
    const uint32_t bits = bits_of(x) & kAbsMask;
    return Spec::scaling().finite_only && bits >= kInfBits ? 0u : bits;
  }
  AQN_DEVICE static float brought(float x, float factor) {
    if (Spec::scaling().rule == Scale::kNone) return x;
    return Spec::scaling().divides() ? x / factor : x * factor;
  }
  AQN_DEVICE float value_of(float q, float decode) const {
    return M == Mode::kUnscaled ? q : (q * decode) * tensor_.decode;
  }

  // From x to what is stored, given the block's scale.
  AQN_DEVICE float cast(float x, const BlockScale& b, uint32_t word) {
    return measured(x, brought(x, b.to_element), b.decode, word);
  }
  AQN_DEVICE float measured(float x, float scaled, float decode, uint32_t word) {
    const float y = value_of(round_to(Spec::element(), scaled, word), decode);
    if (M == Mode::kMeasured) {
      const Element e = Spec::element();
      sums_.cast(x, held(y, static_cast<const T*>(nullptr)), scaled, e.max, -e.max_negative);
    }
    return y;
  }

  // The random words of N values that follow each other in memory, from a multiple of N.
  template <int N>
  AQN_DEVICE void words(uint32_t (&w)[N], int64_t index) const {
    if (!draws()) return;
    if (Spec::kWholeDraws) {
      const Quotient at = divided(index, a_.columns);
      random_words<false>(w, stream_, a_.rows.row(at.whole), static_cast<uint64_t>(at.rest));
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) w[j] = word(index + j);
    }
  }
  AQN_DEVICE uint32_t word(int64_t index) const {
    if (!draws()) return 0;
    const Quotient at = divided(index, a_.columns);
    return stream_.one(a_.rows.row(at.whole), a_.rows.first(at.whole) + static_cast<uint64_t>(at.rest));
  }

  AQN_DEVICE void store_scale(int64_t i, uint32_t bits) const {
    if (M == Mode::kUnscaled) static_cast<uint32_t*>(a_.scales)[i] = bits;
  }
  AQN_DEVICE void finish() const {
    if (M == Mode::kMeasured) sums_.write(a_.parts);
  }

  // ---- rules that look at all values of a block: trial(i) calls of one candidate are added up by the caller ----

  // The element of one value under a trial scale, rounded to nearest even, and its error in the rule's own units.
  AQN_DEVICE float trial_error(float x, const BlockScale& b) const {
    const Scaling k = Spec::scaling();
    const bool none = k.finite_only && !is_finite(x);
    const float scaled = none ? 0.0f : brought(x, b.to_element);
    Element nearest = Spec::element();
    nearest.rounding = Rounding::kNearestEven;
    const float trial = round_to(nearest, scaled, 0);
    if (k.rule == Scale::kLeastError) return (trial - scaled) * (trial - scaled);
    const float off = ((trial * b.s) * amax_) / k.largest - x;
    return k.rule == Scale::kFourOverSixMse ? off * off : abs_of(off);
  }

  // The best of a rule's candidates; error_of(scale) adds up a block's errors.
  template <class ErrorOf>
  AQN_DEVICE BlockScale search(uint32_t amax_bits, const ErrorOf& error_of) const {
    const Scaling k = Spec::scaling();
    if (k.rule == Scale::kLeastError) {
      if (amax_bits == 0 || amax_bits >= kInfBits) return e8m0_scale(k, amax_bits);
      const int e0 = e8m0_exponent(k, amax_bits), floor = e0 < -127 ? -127 : (e0 > 127 ? 127 : e0);
      int best = floor;
      float least = error_of(power_of_two(floor));
#pragma unroll 1
      for (int shift = 1; shift >= -1; shift -= 2) {
        const int sum = floor + shift, e = sum < -127 ? -127 : (sum > 127 ? 127 : sum);
        const float error = error_of(power_of_two(e)) * exp2_of(2 * (e - floor));
        best = error < least ? e : best;
        least = error < least ? error : least;
      }
      return power_of_two(best);
    }
    const float base = (float_of(amax_bits) / 6.0f) * tensor_.encode;
    const BlockScale six = two_level_scale(tensor_, e4m3_rounder(), base);
    const BlockScale four = two_level_scale(tensor_, e4m3_rounder(), base * 1.5f);
    const float error6 = error_of(six), error4 = error_of(four);
    return error4 < error6 ? four : six;
  }

 private:
  const CastArgs& a_;
  float amax_;
  TensorScale tensor_;
  Stream stream_;
  Sums sums_;
};

// The largest magnitude of a tensor, as bits, into a word that was 0. NaN has the largest bits: it survives.
struct AmaxArgs {
  const void* x;
  uint32_t* amax;
  int64_t n;
};

template <class T>
AQN_DEVICE void amax(const AmaxArgs& a) {
  constexpr int V = kVector<T>;
  const T* x = static_cast<const T*>(a.x);
  const int64_t vectors = a.n / V;
  uint32_t m = 0;
  for (int64_t i = thread_index(); i < vectors; i += thread_count()) {
    float v[V];
    load_vector(v, x + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) m = larger(m, bits_of(v[j]) & kAbsMask);
  }
  if (thread_index() < a.n - vectors * V) m = larger(m, bits_of(load(x[vectors * V + thread_index()])) & kAbsMask);
  m = largest_of_team<kThreads>(m);
  if (threadIdx.x == 0) atomicMax(a.amax, m);
}

struct TensorScaleArgs {
  const uint32_t* amax;
  float* scale;
};

template <class Spec>
AQN_DEVICE void tensor_scale(const TensorScaleArgs& a) {
  if (threadIdx.x == 0) *a.scale = TensorScale(Spec::scaling(), float_of(*a.amax)).stored;
}

template <class Spec, class T, Mode M>
AQN_DEVICE void cast_elements(const CastArgs& a) {
  constexpr int V = kVector<T>;
  Caster<Spec, T, M> k(a);
  const BlockScale b = k.tensor_scale();
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t all = a.batch * a.high * a.wide, vectors = all / V;
  for (int64_t i = thread_index(); i < vectors; i += thread_count()) {
    float v[V];
    uint32_t words[V] = {};
    load_vector(v, x + i * V);
    k.words(words, i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = k.cast(v[j], b, words[j]);
    store_vector(y + i * V, v);
  }
  const int64_t rest = vectors * V + thread_index();
  if (rest < all) store_one(y + rest, k.cast(load(x[rest]), b, k.word(rest)));
  if (thread_index() == 0 && Spec::scaling().rule != Scale::kNone) k.store_scale(0, bits_of(b.s));
  k.finish();
}

// Blocks of N that follow each other, whole ones.
template <class Spec, class T, Mode M, int N>
AQN_DEVICE void cast_rows(const CastArgs& a) {
  constexpr int V = kVector<T>, kLanes = N / V;
  Caster<Spec, T, M> k(a);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t vectors = a.batch * a.high * a.wide / V;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  // A warp stays whole until all of its lanes are done: they exchange their largest values.
  for (int64_t i = thread_index(); i - lane < vectors; i += thread_count()) {
    float v[V] = {};
    uint32_t words[V] = {}, m = 0;
    const bool inside = i < vectors;
    if (inside) load_vector(v, x + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) m = larger(m, k.counted(v[j]));
    const BlockScale b = k.scale_of(largest_of_lanes<kLanes>(m));
    if (!inside) continue;
    k.words(words, i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = k.cast(v[j], b, words[j]);
    store_vector(y + i * V, v);
    if (lane % kLanes == 0) k.store_scale(i / kLanes, bits_of(b.s));
  }
  k.finish();
}

// One row of a block each thread. Contiguous: blocks of exactly N in contiguous memory. Else values lie a.high apart,
// and the last block of an axis may be shorter, as if filled with zeros.
template <class Spec, class T, Mode M, int N, bool Contiguous>
AQN_DEVICE void cast_held(const CastArgs& a) {
  Caster<Spec, T, M> k(a);
  const bool hif4 = N == 64 && Spec::scaling().rule == Scale::kHif4;
  const int64_t across = (a.wide + N - 1) / N, blocks = a.batch * across * a.high;
  for (int64_t i = thread_index(); i < blocks; i += thread_count()) {
    int64_t at = i * N, step = 1;
    int n = N;
    if (!Contiguous) {
      const Quotient column = divided(i, a.high), block = divided(column.whole, across);
      step = a.high;
      at = (block.whole * a.wide + block.rest * N) * a.high + column.rest;
      n = static_cast<int>(smaller(N, a.wide - block.rest * N));
    }
    const T* from = static_cast<const T*>(a.x) + at;
    T* to = static_cast<T*>(a.y) + at;
    float x[N];
    if constexpr (Contiguous) {
      load_vector(x, from);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = j < n ? load(from[j * step]) : 0.0f;
    }
    BlockScale b = {};
    Hif4 levels = {};
    if (hif4) {
      uint32_t of4[16] = {};
#pragma unroll
      for (int j = 0; j < N; ++j) of4[j / 4 % 16] = larger(of4[j / 4 % 16], bits_of(x[j]) & kAbsMask);
      levels = hif4_scales(of4);
      k.store_scale(i, levels.levels);
    } else {
      uint32_t m = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) m = larger(m, k.counted(x[j]));
      if (Spec::scaling().searches())
        b = k.search(m, [&](const BlockScale& trial) {
          float error = 0.0f;
#pragma unroll
          for (int j = 0; j < N; ++j) error += k.trial_error(x[j], trial);
          return error;
        });
      else
        b = k.scale_of(m);
      k.store_scale(i, bits_of(b.s));
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= n) continue;
      const uint32_t word = k.word(at + j * step);
      if (hif4) {
        const int shift = levels.shift(j / 4);
        x[j] = k.measured(x[j], hif4_scaled(levels, shift, x[j]), hif4_decode(levels, shift), word);
      } else {
        x[j] = k.cast(x[j], b, word);
      }
    }
    if constexpr (Contiguous) {
      store_vector(to, x);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (j < n) store_one(to + j * step, x[j]);
    }
  }
  k.finish();
}

// The way of one lane over a block: `inner` values are neighbours in memory, `outer` ones are `stride` apart.
struct Walk {
  int64_t inner, outer, stride;
  int lanes, first_inner, first_outer, step_outer;

  AQN_DEVICE Walk(int64_t inner, int64_t outer, int64_t stride, int lane, int team)
      : inner(inner), outer(outer), stride(stride), lanes(1) {
    while (lanes < kWarp && 2 * lanes <= inner) lanes *= 2;
    first_inner = lane % lanes;
    first_outer = lane / lanes;
    step_outer = team / lanes;
  }
  template <class Body>
  AQN_DEVICE void operator()(const Body& body) const {  // body(offset)
    for (int64_t o = first_outer; o < outer; o += step_outer)
      for (int64_t i = first_inner; i < inner; i += lanes) body(o * stride + i);
  }
};

// count values added up as a tree whose first sums are those of the first half and the second: value(i) + value(i +
// half).
template <class Value>
AQN_DEVICE float halves_sum(int bits, const Value& value) {  // of 2^bits values
  constexpr int kLevels = 12;
  float sums[kLevels];  // of subtrees that wait for their other half
  float sum = 0.0f;
  for (uint32_t i = 0; i < 1u << bits; ++i) {
    uint32_t reversed = 0;
    for (int b = 0; b < bits; ++b) reversed |= ((i >> b) & 1u) << (bits - 1 - b);
    sum = value(reversed);
    bool waits = false;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      const bool here = !waits && ((i >> level) & 1u) == 0;
      if (here) sums[level] = sum;
      waits = waits || here;
      if (!waits) sum = sums[level] + sum;
    }
  }
  return sum;
}

// A block's error by a warp, which adds each row from left to right, then rows pairwise, first half and second.
template <class Error>
AQN_DEVICE float warp_error(int64_t rows, int lane, const Error& row_error) {
  int bits = 0;
  while ((int64_t{kWarp} << bits) < rows) ++bits;
  float sum = halves_sum(bits, [&](uint32_t i) {
    const int64_t r = lane + static_cast<int64_t>(kWarp) * i;
    return r < rows ? row_error(r) : 0.0f;
  });
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const float other = float_of(__shfl_xor_sync(0xffffffffu, bits_of(sum), half));
    sum = sum + other;
  }
  return sum;
}

// Blocks of any size, Team lanes each.
template <class Spec, class T, Mode M, int Team>
AQN_DEVICE void cast_team(const CastArgs& a) {
  Caster<Spec, T, M> k(a);
  const Scaling s = Spec::scaling();
  const int64_t rows = s.rows, columns = s.columns ? s.columns : (a.wide ? a.wide : 1);
  const int64_t down = (a.high + rows - 1) / rows, across = (a.wide + columns - 1) / columns;
  const int64_t step_row = a.row_major ? a.wide : 1, step_column = a.row_major ? 1 : a.high;
  const int64_t inner = a.row_major ? across : down, outer = a.row_major ? down : across;
  const int64_t all = a.batch * down * across;
  const int lane = static_cast<int>(threadIdx.x % Team);
  for (int64_t i = thread_index() / Team; i < all; i += thread_count() / Team) {
    // Blocks are numbered as their scales lie in memory.
    const Quotient line = divided(i, inner), matrix = divided(line.whole, outer);
    const int64_t row = (a.row_major ? matrix.rest : line.rest) * rows;
    const int64_t column = (a.row_major ? line.rest : matrix.rest) * columns;
    const int64_t at = matrix.whole * a.high * a.wide + row * step_row + column * step_column;
    const int64_t height = smaller(rows, a.high - row), width = smaller(columns, a.wide - column);
    const T* from = static_cast<const T*>(a.x) + at;
    T* to = static_cast<T*>(a.y) + at;
    const Walk walk(a.row_major ? width : height, a.row_major ? height : width, a.row_major ? a.wide : a.high, lane,
                    Team);
    uint32_t m = 0;
    walk([&](int64_t offset) { m = larger(m, k.counted(load(from[offset]))); });
    m = largest_of_team<Team>(m);
    BlockScale b;
    if (Spec::scaling().searches())
      b = k.search(m, [&](const BlockScale& trial) {
        return warp_error(height, lane, [&](int64_t r) {
          float error = 0.0f;
          for (int64_t c = 0; c < width; ++c) error += k.trial_error(load(from[r * step_row + c * step_column]), trial);
          return error;
        });
      });
    else
      b = k.scale_of(m);
    if (lane == 0) k.store_scale(i, bits_of(b.s));
    walk([&](int64_t offset) { store_one(to + offset, k.cast(load(from[offset]), b, k.word(at + offset))); });
  }
  k.finish();
}

}  // namespace aqn::cuda
