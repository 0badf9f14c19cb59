// Casts to formats whose scale depends on the block's largest value alone, or on no block: what most casts run.
#pragma once

#include "cast_shared.h"

namespace aqn::cpu::AQN_ISA {
namespace {

// n values of a run, each with its own scale.
template <class T, bool kMeasure>
void cast_run(Run<T, kMeasure>& run, Way way, const CastConstants& k, const T* from, int n, int64_t offset,
              const float* to_element, const float* decode, const Bits<T>* low, const Bits<T>* limit) {
  const Spacing spacing = k.spacing;
  const float t = k.decode();
  if (way == Way::kClosed) {
    with_nearest(k.element, [&](auto kind) {
      run.in_units(from, n, [&](T* to, const T* x, int i) {
        direct<decltype(kind), kUnit, true, true>(to, x, spacing, low + i, limit + i);
      });
    });
  } else if (way == Way::kDirect) {
    with_nearest(k.element, [&](auto kind) {
      run.in_units(from, n, [&](T* to, const T* x, int i) {
        direct<decltype(kind), kUnit, true, false>(to, x, spacing, low + i, limit + i);
      });
    });
  } else if (way == Way::kScaled && k.scaling.divides()) {
    with_even(k.element, [&](auto kind) {
      run.in_units(from, n, [&](T* to, const T* x, int i) {
        scaled<decltype(kind), kUnit, true, true>(to, x, spacing, to_element + i, decode + i, t);
      });
    });
  } else if (way == Way::kScaled) {
    with_even(k.element, [&](auto kind) {
      run.in_units(from, n, [&](T* to, const T* x, int i) {
        scaled<decltype(kind), kUnit, true, false>(to, x, spacing, to_element + i, decode + i, t);
      });
    });
  } else {
    run.scale(from, n, offset, to_element, decode);
  }
}

// `blocks` of `units` times U values, each with a scale.
template <int U, class T>
void cast_blocks_of(T* out, Way way, const CastConstants& k, const T* x, int blocks, int units, const float* to_element,
                    const float* decode, const Bits<T>* low, const Bits<T>* limit) {
  const Spacing spacing = k.spacing;
  const float t = k.decode();
  const auto each = [&](const auto& body) {
    for (int b = 0, at = 0; b < blocks; ++b)
      for (int u = 0; u < units; ++u, at += U) body(out + at, x + at, b);
  };
  if (way == Way::kClosed) {
    with_nearest(k.element, [&](auto kind) {
      each([&](T* to, const T* from, int b) {
        direct<decltype(kind), U, false, true>(to, from, spacing, low + b, limit + b);
      });
    });
  } else if (way == Way::kDirect) {
    with_nearest(k.element, [&](auto kind) {
      each([&](T* to, const T* from, int b) {
        direct<decltype(kind), U, false, false>(to, from, spacing, low + b, limit + b);
      });
    });
  } else if (k.scaling.divides()) {
    with_even(k.element, [&](auto kind) {
      each([&](T* to, const T* from, int b) {
        scaled<decltype(kind), U, false, true>(to, from, spacing, to_element + b, decode + b, t);
      });
    });
  } else {
    with_even(k.element, [&](auto kind) {
      each([&](T* to, const T* from, int b) {
        scaled<decltype(kind), U, false, false>(to, from, spacing, to_element + b, decode + b, t);
      });
    });
  }
}

// No scale, or one for the whole tensor.
template <class T, bool kMeasure>
Stats cast_elements(const CastArgs& a) {
  const CastConstants k(a);
  BlockScale b = {1.0f, 1.0f, 1.0f};
  if (a.scaling.rule != Scale::kNone) b = fp32_scale(a.scaling, a.tensor_amax);
  if (a.scales) static_cast<float*>(a.scales)[0] = b.s;
  const Way way = k.way(a.dtype);
  const int64_t all = a.batch * a.high * a.wide, per_chunk = 16384, chunks = (all + per_chunk - 1) / per_chunk;
  Lanes<T, kRun> lanes = {};
  std::fill_n(lanes.to_element, kRun, b.to_element);
  std::fill_n(lanes.decode, kRun, k.decode(b));
  std::fill_n(lanes.low, kRun, narrowed<T>(k.spacing.low));
  std::fill_n(lanes.limit, kRun, narrowed<T>(k.spacing.max));
  std::vector<Stats> parts(kMeasure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    Run<T, kMeasure> run(k);
    const int64_t first = c * per_chunk, last = std::min(all, first + per_chunk);
    for (int64_t i = first; i < last; i += kRun) {
      const int n = static_cast<int>(std::min<int64_t>(kRun, last - i));
      const T* from = static_cast<const T*>(a.x) + i;
      if (n == kRun && way != Way::kAny)
        cast_blocks_of<kUnit>(run.out, way, k, from, 1, kRun / kUnit, lanes.to_element, lanes.decode, lanes.low,
                              lanes.limit);
      else
        cast_run(run, way, k, from, n, i, lanes.to_element, lanes.decode, lanes.low, lanes.limit);
      run.finish(static_cast<T*>(a.y) + i, from, n, lanes.to_element, sums);
    }
    if (kMeasure) sums.flush(parts[c], last - first);
    end_stream();
  });
  return total(parts);
}

// Whole blocks that follow each other, of a multiple of U and a divisor of kRun: kBatch of them at a time, so that
// their maxima and scales are found in lanes.
template <class T, bool kMeasure, int U>
Stats cast_whole_blocks(const CastArgs& a) {
  constexpr int kBatch = 64, kGroup = 16;
  const CastConstants k(a);
  const int size = a.scaling.columns, units = size / U, per_run = kRun / size;
  const int64_t all = a.batch * (a.wide / size), per_chunk = 16384 / size, chunks = (all + per_chunk - 1) / per_chunk;
  const Way usual = k.way(a.dtype);
  std::vector<Stats> parts(kMeasure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    Run<T, kMeasure> run(k);
    Lanes<T, kRun> lanes;
    const int64_t first = c * per_chunk, last = std::min(all, first + per_chunk);
    for (int64_t i = first; i < last; i += kBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kBatch, last - i));
      const T* from = static_cast<const T*>(a.x) + i * size;
      T* to = static_cast<T*>(a.y) + i * size;
      alignas(64) uint32_t amax[kBatch] = {};
      alignas(64) float stored[kBatch];
      Lanes<T, kBatch> own;
      int b = 0;
      for (; b + kGroup <= batch; b += kGroup) block_maxima<T, kGroup, U>(amax + b, from + b * size, units);
      for (; b < batch; ++b) block_maxima<T, 1, U>(amax + b, from + b * size, units);
      k.block_scales(own.to_element, own.decode, stored, amax, kBatch);
      if (a.scales) std::copy_n(stored, batch, static_cast<float*>(a.scales) + i);
      const Way way = k.way_of(usual, own, stored, amax, kBatch);
      for (int done = 0; done < batch; done += per_run) {
        const int blocks = std::min(per_run, batch - done), n = blocks * size;
        const T* x = from + done * size;
        if (kMeasure || way == Way::kAny)
          for (int b = 0; b < blocks; ++b) {
            std::fill_n(lanes.to_element + b * size, size, own.to_element[done + b]);
            std::fill_n(lanes.decode + b * size, size, own.decode[done + b]);
          }
        if (way == Way::kAny)
          run.scale(x, n, (i + done) * size, lanes.to_element, lanes.decode);
        else
          cast_blocks_of<U>(run.out, way, k, x, blocks, units, own.to_element + done, own.decode + done, own.low + done,
                            own.limit + done);
        run.finish(to + done * size, x, n, lanes.to_element, sums);
      }
    }
    if (kMeasure) sums.flush(parts[c], (last - first) * size);
    end_stream();
  });
  return total(parts);
}

// A tensor as its memory lies: matrices [outer, inner], neighbours along `inner`, in tiles of [down, across] that share
// a scale.
struct Bands {
  int64_t batch, outer, inner, down, across;

  explicit Bands(const CastArgs& a) {
    const int64_t columns = a.scaling.columns ? a.scaling.columns : std::max<int64_t>(a.wide, 1);
    if (a.row_major)
      *this = {a.batch, a.high, a.wide, a.scaling.rows, columns};
    else if (a.high == 1 && a.scaling.rows == 1)
      *this = {1, a.batch, a.wide, 1, columns};
    else
      *this = {a.batch, a.wide, a.high, columns, a.scaling.rows};
  }

 private:
  Bands(int64_t batch, int64_t outer, int64_t inner, int64_t down, int64_t across)
      : batch(batch), outer(outer), inner(inner), down(down), across(across) {}
};

constexpr int kWide = 2048;  // columns of a tile: long pieces of rows are what memory reads best

// The largest magnitudes of the blocks of a tile. Columns beyond kWide are of the same block as those before.
template <class T>
void tile_maxima(uint32_t* amax, const T* from, int64_t step, int height, int width, int across, bool finite_only) {
  alignas(64) Bits<T> columns[kWide];
  constexpr Bits<T> kAbs = static_cast<Bits<T>>(~0u) >> 1, kInf = kInfBits >> (32 - 8 * sizeof(T));
  const Bits<T> largest = finite_only ? kInf - 1 : kAbs;  // what is larger does not count
  const int held = std::min(kWide, width);
  std::fill_n(columns, held, 0);
  for (int r = 0; r < height; ++r)
    for (int start = 0; start < width; start += kWide) {
      const T* x = from + r * step + start;
      const int n = std::min(kWide, width - start);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const Bits<T> m = own_bits(x[i]) & kAbs, counts = m <= largest ? m : 0;
        columns[i] = std::max(columns[i], counts);
      }
    }
  constexpr int kUp = 32 - 8 * sizeof(T);
  if (across == 1) {
#pragma omp simd
    for (int i = 0; i < held; ++i) amax[i] = static_cast<uint32_t>(columns[i]) << kUp;
    return;
  }
  for (int first = 0, b = 0; first < held; first += across, ++b) {
    Bits<T> m = 0;
#pragma omp simd reduction(max : m)
    for (int i = first; i < std::min(held, first + across); ++i) m = std::max(m, columns[i]);
    amax[b] = static_cast<uint32_t>(m) << kUp;
  }
}

// value[i / across], as far as the lanes reach.
template <class V>
void spread(V* lanes, const V* values, int n, int across) {
  if (across == 1)
    std::copy_n(values, n, lanes);
  else
    for (int first = 0, b = 0; first < n; first += across, ++b)
      std::fill(lanes + first, lanes + std::min(n, first + across), values[b]);
}

// Blocks of any shape that lie in a matrix as tiles: a tile's columns have running maxima, and each column its scale.
template <class T, bool kMeasure>
Stats cast_bands(const CastArgs& a) {
  const CastConstants k(a);
  const Bands m(a);
  const int64_t full = m.across < kWide ? kWide / m.across * m.across : m.across;
  const int64_t bands = (m.outer + m.down - 1) / m.down, tiles = (m.inner + full - 1) / full;
  const int64_t blocks_across = (m.inner + m.across - 1) / m.across, all = m.batch * bands * tiles;
  const int64_t per_chunk = std::max<int64_t>(1, 16384 / (m.down * std::min(full, m.inner)));
  const int64_t chunks = (all + per_chunk - 1) / per_chunk;
  const Way usual = k.way(a.dtype);
  std::vector<Stats> parts(kMeasure ? chunks : 0);
  for_chunks(chunks, a.threads, [&](int64_t c) {
    Sums sums;
    Run<T, kMeasure> run(k);
    Lanes<T, kWide> own, lanes;
    alignas(64) uint32_t amax[kWide];
    alignas(64) float stored[kWide];
    int64_t count = 0;
    for (int64_t tile = c * per_chunk; tile < std::min(all, (c + 1) * per_chunk); ++tile) {
      const int64_t column = tile % tiles * full, band = tile / tiles % bands, batch = tile / (tiles * bands);
      const int height = static_cast<int>(std::min(m.down, m.outer - band * m.down));
      const int width = static_cast<int>(std::min(full, m.inner - column)), held = std::min(kWide, width);
      const int64_t at = (batch * m.outer + band * m.down) * m.inner + column;
      const int across = static_cast<int>(std::min<int64_t>(m.across, width)), blocks = (width + across - 1) / across;
      tile_maxima(amax, static_cast<const T*>(a.x) + at, m.inner, height, width, across, a.scaling.finite_only);
      k.block_scales(own.to_element, own.decode, stored, amax, blocks);
      if (a.scales)
        std::copy_n(stored, blocks,
                    static_cast<float*>(a.scales) + (batch * bands + band) * blocks_across + column / m.across);
      const Way way = k.way_of(usual, own, stored, amax, blocks);
      spread(lanes.to_element, own.to_element, held, across);
      spread(lanes.decode, own.decode, held, across);
      if (way == Way::kClosed || way == Way::kDirect) {
        spread(lanes.low, own.low, held, across);
        spread(lanes.limit, own.limit, held, across);
      }
      for (int r = 0; r < height; ++r)
        for (int start = 0; start < width; start += kRun) {
          const int n = std::min(kRun, width - start), lane = start % kWide;
          const int64_t offset = at + r * m.inner + start;
          const T* from = static_cast<const T*>(a.x) + offset;
          cast_run(run, way, k, from, n, offset, lanes.to_element + lane, lanes.decode + lane, lanes.low + lane,
                   lanes.limit + lane);
          run.finish(static_cast<T*>(a.y) + offset, from, n, lanes.to_element + lane, sums);
        }
      count += static_cast<int64_t>(height) * width;
    }
    if (kMeasure) sums.flush(parts[c], count);
    end_stream();
  });
  return total(parts);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
