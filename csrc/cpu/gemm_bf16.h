// Products of bf16 matrices by the host's own instruction, vdpbf16ps, which adds two products to each fp32 sum.
//
// A result is computed in tiles whose sums stay in the L2 cache, from operands that are packed into panels: pairs along
// the contraction, stretch after stretch of it. A micro-kernel keeps kMicroRows x kMicroColumns sums in registers. Each
// sum adds its products in the order of the contraction, so that an element depends on its row and its column alone:
// not on the number of rows, the tile that it falls into or the number of threads.
#pragma once

#include <immintrin.h>

#include <memory>

#include "common.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kMicroRows = 12, kMicroColumns = 32;
constexpr int kTileRows = 11 * kMicroRows, kTileColumns = 8 * kMicroColumns, kDepth = 512;

// An axis in equal parts, multiples of `unit` and at most `most` long; the last may be shorter.
struct Parts {
  int64_t size, length = 0, count = 0;

  Parts(int64_t n, int64_t most, int64_t unit) : size(n) {
    if (n == 0) return;
    const int64_t fewest = (n + most - 1) / most, units = (n + fewest * unit - 1) / (fewest * unit);
    length = units * unit;
    count = (n + length - 1) / length;
  }
  int64_t begin(int64_t i) const { return i * length; }
  int length_of(int64_t i) const { return static_cast<int>(std::min(length, size - begin(i))); }
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

// Adds the products of two panels to Rows rows of a tile's sums, or to zeros.
template <int Rows>
void add_panels(float* sums, const uint32_t* a, const uint32_t* b, int pairs, bool to_zeros) {
  __m512 s[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    s[i][0] = to_zeros ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kTileColumns);
    s[i][1] = to_zeros ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kTileColumns + 16);
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

constexpr void (*kAddPanels[])(float*, const uint32_t*, const uint32_t*, int, bool) = {
    nullptr,       add_panels<1>, add_panels<2>, add_panels<3>,  add_panels<4>,  add_panels<5>, add_panels<6>,
    add_panels<7>, add_panels<8>, add_panels<9>, add_panels<10>, add_panels<11>, add_panels<12>};

// An operand in blocks of panels, one for a tile's rows and a stretch of the contraction. Blocks that several tiles
// need are packed once, before all tiles; others by the thread whose tile needs them, in its own memory.
template <int Width>
class Packed {
 public:
  Packed(const ProductOperand& from, int64_t batch, const Parts& rows, const Parts& depth, bool is_shared)
      : from_(from), rows_(rows), depth_(depth), size_((rows.length * ((depth.length + 1) / 2) + 31) / 16 * 16) {
    shared_blocks = is_shared ? batch * rows.count * depth.count : 0;
    shared_.reset(new Line[shared_blocks * size_ / 16]);
  }
  int64_t shared_blocks;

  void pack_shared(int64_t block) { pack_block(shared_at(block), block); }

  const uint32_t* block(int64_t matrix, int64_t tile, int64_t stretch, uint32_t* own) {
    const int64_t i = (matrix * rows_.count + tile) * depth_.count + stretch;
    if (shared_blocks) return shared_at(i);
    pack_block(own, i);
    return own;
  }

 private:
  struct alignas(64) Line {
    uint32_t pairs[16];
  };

  uint32_t* shared_at(int64_t block) { return shared_[block * size_ / 16].pairs; }

  void pack_block(uint32_t* to, int64_t block) const {
    const int64_t stretch = block % depth_.count, tile = block / depth_.count % rows_.count;
    const uint16_t* matrix =
        static_cast<const uint16_t*>(from_.at) + block / (depth_.count * rows_.count) * from_.batch_stride;
    pack<Width>(to, from_, matrix, rows_.begin(tile), rows_.length_of(tile), depth_.begin(stretch),
                depth_.length_of(stretch));
  }

  const ProductOperand& from_;
  Parts rows_, depth_;
  int64_t size_;  // of a block in pairs, with room for a store of 16 that ends beyond it
  std::unique_ptr<Line[]> shared_;
};

// What a thread works in.
struct alignas(64) Workspace {
  uint32_t a[kTileRows * kDepth / 2 + 16];
  alignas(64) uint32_t b[kTileColumns * kDepth / 2 + 16];
  alignas(64) float sums[kTileRows][kTileColumns];
};

// Part of a result: rows [row, row + rows) and columns [column, column + columns) of a matrix of the batch.
struct ProductTile {
  int64_t matrix, row, column;
  int rows, columns;
};

class Product {
 public:
  explicit Product(const ProductArgs& g)
      : threads_(g.threads),
        rows_(g.m, kTileRows, kMicroRows),
        columns_(g.n, kTileColumns, kMicroColumns),
        depth_(g.k, kDepth, 2),
        a_(g.a, g.batch, rows_, depth_, columns_.count > 1),
        b_(g.b, g.batch, columns_, depth_, rows_.count > 1) {
    tiles = g.batch * rows_.count * columns_.count;
  }
  int64_t tiles;

  // finish(number, tile, sums) for each tile of the result.
  template <class Finish>
  void for_tiles(const Finish& finish) {
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const std::unique_ptr<Workspace> w(new Workspace);
#pragma omp for
      for (int64_t i = 0; i < a_.shared_blocks + b_.shared_blocks; ++i)
        i < a_.shared_blocks ? a_.pack_shared(i) : b_.pack_shared(i - a_.shared_blocks);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tiles; ++i) finish(i, multiply(*w, i), w->sums);
    }
  }

 private:
  // Tiles of the same columns follow one another.
  ProductTile multiply(Workspace& w, int64_t i) {
    const int64_t down = i % rows_.count, right = i / rows_.count % columns_.count;
    const ProductTile t = {i / (rows_.count * columns_.count), rows_.begin(down), columns_.begin(right),
                           rows_.length_of(down), columns_.length_of(right)};
    if (depth_.count == 0) std::fill_n(w.sums[0], t.rows * kTileColumns, 0.0f);
    for (int64_t k = 0; k < depth_.count; ++k) {
      const int pairs = (depth_.length_of(k) + 1) / 2;
      const uint32_t *a = a_.block(t.matrix, down, k, w.a), *b = b_.block(t.matrix, right, k, w.b);
      for (int c = 0; c < t.columns; c += kMicroColumns)
        for (int r = 0; r < t.rows; r += kMicroRows)
          kAddPanels[std::min(kMicroRows, t.rows - r)](w.sums[r] + c, a + r * pairs, b + c * pairs, pairs, k == 0);
    }
    return t;
  }

  int threads_;
  Parts rows_, columns_, depth_;
  Packed<kMicroRows> a_;
  Packed<kMicroColumns> b_;
};

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
