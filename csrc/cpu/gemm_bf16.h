// Products of bf16 matrices by the host's own instruction, vdpbf16ps, which adds two products to each fp32 sum.
//
// A result is computed in tiles that stay in the L2 cache. For each tile and each stretch of the contraction, operands
// are packed into panels of pairs along the contraction, and a micro-kernel keeps kMicroRows x kMicroColumns sums in
// registers. Each sum adds its products in the order of the contraction, so that an element depends on its row and its
// column alone: not on the number of rows, the tile that it falls into or the number of threads.
#pragma once

#include <immintrin.h>

#include <memory>

#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kMicroRows = 12, kMicroColumns = 32;
constexpr int kTileRows = 21 * kMicroRows, kTileColumns = 8 * kMicroColumns, kDepth = 512;

// What a thread works on: the panels of a stretch of the contraction, and the sums of a tile.
struct alignas(64) Panels {
  uint32_t a[kTileRows * kDepth / 2 + 16];  // the last panel is stored 16 pairs at a time
  alignas(64) uint32_t b[kTileColumns * kDepth / 2];
  alignas(64) float sums[kTileRows][kTileColumns];
};

// 16 rows of 16 pairs as 16 columns.
AQN_HD void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += i % 4 == 3 ? 5 : 1) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// `pairs` columns of 16 pairs, `stride` pairs apart, of rows that are contiguous along the contraction.
AQN_HD void pack_along(uint32_t* to, int stride, const uint16_t* from, int64_t row_stride, int rows, int depth) {
  const int pairs = (depth + 1) / 2;
  for (int i = 0; i < pairs; i += 16) {
    const int left = depth - 2 * i, columns = std::min(16, pairs - i);
    const __mmask32 within = left >= 32 ? ~0u : (1u << left) - 1;
    __m512i r[16];
    for (int j = 0; j < 16; ++j)
      r[j] = j < rows ? _mm512_maskz_loadu_epi16(within, from + j * row_stride + 2 * i) : _mm512_setzero_si512();
    transpose(r);
    for (int j = 0; j < columns; ++j) _mm512_storeu_si512(to + (i + j) * stride, r[j]);
  }
}

// The same of rows that are neighbours in memory.
AQN_HD void pack_across(uint32_t* to, int stride, const uint16_t* from, int64_t depth_stride, int rows, int depth) {
  const __mmask16 within = static_cast<__mmask16>((1u << rows) - 1);
  const auto load_rows = [&](int k) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, from + k * depth_stride));
  };
  for (int k = 0; k < depth; k += 2) {
    const __m512i second = k + 1 < depth ? load_rows(k + 1) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + k / 2 * stride, _mm512_or_si512(load_rows(k), _mm512_slli_epi32(second, 16)));
  }
}

// Rows [row, row + rows) and places [k, k + depth) of the contraction as panels of Width rows, the last filled up with
// zeros: pair after pair of places, and in each the Width rows.
template <int Width>
void pack(uint32_t* to, const ProductOperand& o, const uint16_t* matrix, int64_t row, int rows, int64_t k, int depth) {
  const int64_t panel = static_cast<int64_t>((depth + 1) / 2) * Width;
  for (int first = 0; first < rows; first += Width, to += panel)
    for (int i = 0; i < Width; i += 16) {
      const int count = std::max(0, std::min(16, rows - first - i));
      const uint16_t* from = matrix + (row + first + i) * o.row_stride + k * o.depth_stride;
      if (o.depth_stride == 1)
        pack_along(to + i, Width, from, o.row_stride, count, depth);
      else
        pack_across(to + i, Width, from, o.depth_stride, count, depth);
    }
}

// Adds the products of two panels to Rows rows of a tile's sums.
template <int Rows>
void add_panels(float* sums, const uint32_t* a, const uint32_t* b, int pairs) {
  __m512 s[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    s[i][0] = _mm512_load_ps(sums + i * kTileColumns);
    s[i][1] = _mm512_load_ps(sums + i * kTileColumns + 16);
  }
  for (int k = 0; k < pairs; ++k, a += kMicroRows, b += kMicroColumns) {
    const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(b));
    const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + 16));
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i])));
      s[i][0] = _mm512_dpbf16_ps(s[i][0], x, b0);
      s[i][1] = _mm512_dpbf16_ps(s[i][1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    _mm512_store_ps(sums + i * kTileColumns, s[i][0]);
    _mm512_store_ps(sums + i * kTileColumns + 16, s[i][1]);
  }
}

constexpr void (*kAddPanels[])(float*, const uint32_t*, const uint32_t*, int) = {
    nullptr,       add_panels<1>, add_panels<2>, add_panels<3>,  add_panels<4>,  add_panels<5>, add_panels<6>,
    add_panels<7>, add_panels<8>, add_panels<9>, add_panels<10>, add_panels<11>, add_panels<12>};

// Part of a result: rows [row, row + rows) and columns [column, column + columns) of matrix `batch`.
struct ProductTile {
  int64_t batch, row, column;
  int rows, columns;
};

void multiply(Panels& p, const ProductArgs& g, const ProductTile& t) {
  const uint16_t* a = static_cast<const uint16_t*>(g.a.at) + t.batch * g.a.batch_stride;
  const uint16_t* b = static_cast<const uint16_t*>(g.b.at) + t.batch * g.b.batch_stride;
  std::fill_n(p.sums[0], t.rows * kTileColumns, 0.0f);
  for (int64_t k = 0; k < g.k; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, g.k - k)), pairs = (depth + 1) / 2;
    pack<kMicroRows>(p.a, g.a, a, t.row, t.rows, k, depth);
    pack<kMicroColumns>(p.b, g.b, b, t.column, t.columns, k, depth);
    for (int j = 0; j < t.columns; j += kMicroColumns)
      for (int i = 0; i < t.rows; i += kMicroRows)
        kAddPanels[std::min(kMicroRows, t.rows - i)](p.sums[i] + j, p.a + i * pairs, p.b + j * pairs, pairs);
  }
}

int64_t tiles_high(const ProductArgs& g) { return (g.m + kTileRows - 1) / kTileRows; }
int64_t tiles_wide(const ProductArgs& g) { return (g.n + kTileColumns - 1) / kTileColumns; }
int64_t count_tiles(const ProductArgs& g) { return g.batch * tiles_high(g) * tiles_wide(g); }

// finish(tile's number, tile, sums) for each tile of the result.
template <class Finish>
void for_products(const ProductArgs& g, const Finish& finish) {
  const int64_t high = tiles_high(g), wide = tiles_wide(g), count = count_tiles(g);
#pragma omp parallel num_threads(g.threads) if (g.threads > 1)
  {
    const std::unique_ptr<Panels> panels(new Panels);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i % high * kTileRows, column = i / high % wide * kTileColumns;
      const ProductTile t = {i / (high * wide), row, column, static_cast<int>(std::min<int64_t>(kTileRows, g.m - row)),
                             static_cast<int>(std::min<int64_t>(kTileColumns, g.n - column))};
      multiply(*panels, g, t);
      finish(i, t, panels->sums);
    }
  }
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
