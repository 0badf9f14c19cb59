// The kernels of processors that multiply bf16 matrices: those of avx512, and `product`.
#include "gemm_bf16.h"

#include "perturb.h"

namespace aqn::cpu {

namespace avx512 {
extern const Kernels table;
}

namespace AQN_ISA {
namespace {

void add(float* to, const float* what, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] += what[i];
}

// A tile that misses before the bias is added: what was injected is of the product, all else of the sum that is stored.
template <class Out, bool Measure>
void miss_then_add_bias(const ProductArgs& g, const ProductTile& t, float (*clean)[kTileColumns], Out* out, Stats& s) {
  const float* bias = g.bias + t.column;
  const float no_unit[kTileColumns] = {};
  float missed[kTileColumns], was[kTileColumns], stored[kTileColumns];
  Stats injected;
  Sums sums;
  for (int i = 0; i < t.rows; ++i, out += g.n) {
    perturb_part<float, Measure>(g.result, t.matrix * g.m + t.row + i, 1, t.column, t.columns, clean[i], 0, missed, 0,
                                 injected);
    add(missed, bias, t.columns);
    store_all(out, missed, t.columns);
    if (!Measure) continue;
    load_all(stored, out, t.columns);
    add(clean[i], bias, t.columns);
    Out held[kTileColumns];
    store_all(held, clean[i], t.columns);
    load_all(was, held, t.columns);
    measure_perturb(clean[i], missed, was, stored, no_unit, t.columns, sums);
  }
  if (!Measure) return;
  sums.flush(s, t.rows * t.columns);
  s.injected2 = injected.injected2;
  s.injected_n = injected.injected_n;
  s.hits = injected.hits;
}

template <class Out, bool Measure>
Stats miss(const ProductArgs& g, const ProductTile& t, float (*sums)[kTileColumns]) {
  const int64_t row = t.matrix * g.m + t.row;
  Out* out = static_cast<Out*>(g.result.out) + row * g.n + t.column;
  Stats s;
  if (g.bias && !g.bias_is_missed) {
    miss_then_add_bias<Out, Measure>(g, t, sums, out, s);
    return s;
  }
  for (int i = 0; g.bias && i < t.rows; ++i) add(sums[i], g.bias + t.column, t.columns);
  perturb_part<Out, Measure>(g.result, row, t.rows, t.column, t.columns, sums[0], kTileColumns, out, g.n, s);
  return s;
}

template <class Out, bool Measure>
Stats missed_product(const ProductArgs& g) {
  Product p(g);
  std::vector<Stats> parts(p.tiles);
  p.for_tiles(
      [&](int64_t i, const ProductTile& t, float (*sums)[kTileColumns]) { parts[i] = miss<Out, Measure>(g, t, sums); });
  return total(parts);
}

Stats plain_product(const ProductArgs& g) {
  Product(g).for_tiles([&](int64_t, const ProductTile& t, float (*sums)[kTileColumns]) {
    float* out = static_cast<float*>(g.result.out) + (t.matrix * g.m + t.row) * g.n + t.column;
    for (int i = 0; i < t.rows; ++i) std::copy_n(sums[i], t.columns, out + i * g.n);
  });
  return {};
}

Stats product(const ProductArgs& g, bool measure) {
  if (g.result.models_count == 0) return plain_product(g);
  if (g.result.out_dtype == Dtype::kBFloat16)
    return measure ? missed_product<bf16, true>(g) : missed_product<bf16, false>(g);
  return measure ? missed_product<float, true>(g) : missed_product<float, false>(g);
}

Kernels with_product() {
  Kernels k = avx512::table;
  k.isa = AQN_ISA_NAME;
  k.product = product;
  return k;
}

}  // namespace

extern const Kernels table;
const Kernels table = with_product();

}  // namespace AQN_ISA
}  // namespace aqn::cpu
