// Casts: the choice of the loop for a format.
#pragma once

#include "cast_blocks.h"
#include "cast_rows.h"

namespace aqn::cpu::AQN_ISA {
namespace {

template <class T, bool kMeasure>
Stats cast_typed(const CastArgs& a) {
  const Scaling& s = a.scaling;
  if (s.rule == Scale::kNone || s.rows == 0) return cast_elements<T, kMeasure>(a);
  if (s.searches() || s.rule == Scale::kHif4) return cast_blocks<T, kMeasure>(a);
  const bool in_rows = s.rows == 1 && a.high == 1 && s.columns >= 16 && kRun % s.columns == 0;
  if (!in_rows || a.wide % s.columns || s.finite_only) return cast_bands<T, kMeasure>(a);
  return s.columns == 16 ? cast_whole_blocks<T, kMeasure, 16>(a) : cast_whole_blocks<T, kMeasure, 32>(a);
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
