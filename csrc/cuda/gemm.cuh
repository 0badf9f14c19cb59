// GEMMs whose products are added as a matrix unit adds them; a thread for each output. `Spec` has the accumulator as
// literals.
#pragma once

#include "../core/accumulate.h"
#include "device.cuh"

namespace aqn::cuda {

struct GemmArgs {
  const void *a, *b;
  float* out;
  int64_t batch, m, k, n;
};

// The operands of one output: value(i) of a row of a and of a column of b, 0 beyond the end.
template <class Spec, class T>
struct Pair {
  const T *a, *b;
  int64_t k, n;

  AQN_DEVICE float flushed(float x) const {
    const Accumulator u = Spec::accumulator();
    return u.flush && abs_of(x) < exp2_of(u.min_exponent) ? 0.0f : x;
  }
  AQN_DEVICE float first(int64_t i) const { return i < k ? flushed(load(a[i])) : 0.0f; }
  AQN_DEVICE float other(int64_t i) const { return i < k ? flushed(load(b[i * n])) : 0.0f; }
};

// The products at first, first + step, ... of a chunk: their largest exponent, at least `largest`, and under it their
// sum, which a double holds exactly.
template <class Spec, class T>
AQN_DEVICE double products(const Pair<Spec, T>& p, int64_t start, int first, int step, int& largest) {
  const Accumulator u = Spec::accumulator();
  for (int i = first; i < u.chunk; i += step)
    largest =
        aqn::larger(largest, operand_of(p.first(start + i), u).aligned + operand_of(p.other(start + i), u).aligned);
  double sum = 0;
  for (int i = first; i < u.chunk; i += step) {
    const Operand a = operand_of(p.first(start + i), u), b = operand_of(p.other(start + i), u);
    const int below = aqn::larger(a.exponent + b.exponent - largest, -64);  // a summand so far below is cut to 0
    const float term = a.significand * b.significand * exp2_of(below + u.fraction_bits);
    sum += static_cast<double>(u.nearest ? cut<int64_t, true>(term) : cut<int64_t, false>(term));
  }
  return sum;
}

// The sum of products that are no numbers of the unit, by IEEE's rules; else 0.
template <class Spec, class T>
AQN_DEVICE float specials(const Pair<Spec, T>& p, int64_t start) {
  const Accumulator u = Spec::accumulator();
  float sum = 0.0f;
  for (int i = 0; i < u.chunk; ++i) {
    const float x = p.first(start + i), y = p.other(start + i), product = x * y;
    const bool number = is_finite(x) && is_finite(y) && (u.order == Order::kFused || is_finite(product));
    sum += number ? 0.0f : product;
  }
  return sum;
}

// One chunk in fixed point; infinities and NaNs are added apart.
template <class Spec, class T>
AQN_DEVICE float add_aligned(const Pair<Spec, T>& p, int64_t start, float running) {
  const Accumulator u = Spec::accumulator();
  const float before = is_finite(running) ? running : 0.0f;
  float after;
  if (u.order == Order::kFused) {
    int largest = aqn::larger(running_exponent(before), -126);
    const double sum = products(p, start, 0, 1, largest);
    const double own = static_cast<double>(before) * double_exp2_of(u.fraction_bits - largest);
    const int64_t kept = u.nearest ? cut<int64_t, true>(own) : cut<int64_t, false>(own);
    after = result_of((sum + static_cast<double>(kept)) * double_exp2_of(largest - u.fraction_bits), u);
  } else {
    int largest = kLowestExponent;
    double sum;
    if (u.order == Order::kProductsFirst) {
      sum = products(p, start, 0, 1, largest);
    } else {
      int odd_largest = kLowestExponent;
      const double even = products(p, start, 0, 2, largest), odd = products(p, start, 1, 2, odd_largest);
      const int common = aqn::larger(largest, odd_largest);
      sum =
          round_down(even * double_exp2_of(largest - common)) + round_down(odd * double_exp2_of(odd_largest - common));
      largest = common;
    }
    after = result_of(with_running(sum, largest, before, u), u);
  }
  const float beyond = running + specials(p, start);
  return is_finite(beyond) ? after : beyond;
}

// One chunk in fp32: the products' tree of sums, neighbours first, then the running sum.
template <class Spec, class T>
AQN_DEVICE float add_pairwise(const Pair<Spec, T>& p, int64_t start, float running) {
  const Accumulator u = Spec::accumulator();
  const float smallest = u.flush ? 1.17549435e-38f : 0.0f;
  constexpr int kLevels = 9;
  float sums[kLevels];  // of subtrees that wait for their right neighbour
  float sum = 0.0f;
  for (int i = 0; i < u.chunk; ++i) {
    sum = p.first(start + i) * p.other(start + i);
    sum = abs_of(sum) < smallest ? 0.0f : sum;
    bool waits = false;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      const bool here = !waits && ((i >> level) & 1) == 0;
      if (here) sums[level] = sum;
      waits = waits || here;
      if (!waits) sum = sums[level] + sum;
      sum = abs_of(sum) < smallest ? 0.0f : sum;
    }
  }
  sum = running + sum;
  return abs_of(sum) < smallest ? 0.0f : sum;
}

template <class Spec, class T>
AQN_DEVICE void gemm(const GemmArgs& g) {
  const Accumulator u = Spec::accumulator();
  for (int64_t i = thread_index(); i < g.batch * g.m * g.n; i += thread_count()) {
    const Quotient row = divided(i, g.n), batch = divided(row.whole, g.m);
    const Pair<Spec, T> p = {static_cast<const T*>(g.a) + row.whole * g.k,
                             static_cast<const T*>(g.b) + batch.whole * g.k * g.n + row.rest, g.k, g.n};
    float running = 0.0f, total = 0.0f;
    for (int64_t start = 0; start < g.k; start += u.chunk) {
      running = u.order == Order::kPairwise ? add_pairwise(p, start, running) : add_aligned(p, start, running);
      if (u.promote && (start + u.chunk) % u.promote == 0) {
        total += running;
        running = 0.0f;
      }
    }
    if (u.promote) total += running;
    const float result = u.promote ? total : running;
    g.out[i] = is_nan(result) ? float_of(kNanBits) : result + 0.0f;
  }
}

}  // namespace aqn::cuda
