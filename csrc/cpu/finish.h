// How a result leaves an op: its error, its cast along the last axis, and the dtype it is stored in, while it is in the
// cache. Equal to perturb, cast and a conversion one after the other.
#pragma once

#include "cast.h"
#include "perturb.h"

namespace aqn::cpu::AQN_ISA {
namespace {

template <class In, class Out>
Finished finish_typed(const FinishArgs& f, bool measure) {
  const PerturbArgs& a = f.perturb;
  // Where blocks end with the rows, or there are none, a chunk is cast as one row, else row by row.
  const int64_t block = f.cast.scaling.rule == Scale::kNone ? 1 : f.cast.scaling.columns;  // 0: the row is one
  const bool whole = block && a.columns % block == 0 && Lines::kLine % block == 0;
  const Lines lines(a.rows, a.columns, whole ? Lines::kLine : a.columns);
  std::vector<Finished> parts(lines.chunks);
  for_chunks(lines.chunks, a.threads, [&](int64_t c) {
    const Lines::Range range = lines.range(c);
    const In* y = static_cast<const In*>(a.y) + range.at;
    Out* out = static_cast<Out*>(a.out) + range.at;
    std::vector<In> missed(a.models_count ? range.count : 0), held(std::is_same<In, Out>::value ? 0 : range.count);
    if (a.models_count) {
      Sums sums;
      lines.for_each(c, [&](int64_t row, int64_t column, int64_t n) {
        const int64_t at = row * a.columns + column - range.at;
        if (measure)
          perturb_line<In, In, true>(a, row, column, n, y + at, missed.data() + at, nullptr, sums);
        else
          perturb_line<In, In, false>(a, row, column, n, y + at, missed.data() + at, nullptr, sums);
      });
      if (measure) sums.flush(parts[c].error, range.count);
    }
    CastArgs cast_args = f.cast;
    cast_args.x = a.models_count ? missed.data() : y;
    cast_args.y = held.empty() ? static_cast<void*>(out) : held.data();
    cast_args.batch = whole ? 1 : range.count / a.columns;
    cast_args.wide = whole ? range.count : a.columns;
    parts[c].cast = cast(cast_args, measure);
    for (size_t i = 0; i < held.size(); ++i) store(out + i, load(held[i]));
  });
  Finished all;
  for (const Finished& p : parts) {
    add(all.error, p.error);
    add(all.cast, p.cast);
  }
  return all;
}

Finished finish(const FinishArgs& f, bool measure) {
  if (f.perturb.rows == 0 || f.perturb.columns == 0) return {};
  const bool bf16_out = f.perturb.out_dtype == Dtype::kBFloat16;
  if (f.perturb.in_dtype == Dtype::kBFloat16)
    return bf16_out ? finish_typed<bf16, bf16>(f, measure) : finish_typed<bf16, float>(f, measure);
  return bf16_out ? finish_typed<float, bf16>(f, measure) : finish_typed<float, float>(f, measure);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
