// Casts: of single elements, and the choice of the loop for a block format.
#pragma once

#include "cast_blocks.h"
#include "cast_plain.h"

namespace aqn::cpu::AQN_ISA {
namespace {

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
