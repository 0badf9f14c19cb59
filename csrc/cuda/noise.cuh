// Where random numbers come from on the device: aqnsim/rng.py's coordinates, whose clock is read by address, so that a
// recorded graph draws anew when the clock moves.
#pragma once

#include "../core/normal.h"
#include "../core/philox.h"
#include "device.cuh"

namespace aqn::cuda {

enum class Draw : int { kPerPhase = 0, kPerStep = 1, kFrozen = 2, kPerRun = 3 };

// A clock on the device, or, where `at` is null, its value.
struct Clock {
  const int64_t* at;
  int64_t value;

  AQN_DEVICE uint64_t read() const { return static_cast<uint64_t>(at ? *at : value); }
};

// coordinates() of aqnsim/rng.py; `place` is 4 model + part.
struct Stream {
  uint64_t key;
  uint32_t word;

  AQN_DEVICE Stream(uint64_t base, uint64_t clock, Draw draw, int place) {
    const uint64_t run = draw == Draw::kPerRun ? clock >> 32 : 0;
    key = (base ^ run * 0x9E3779B97F4A7C15ull) + static_cast<uint64_t>(place) * 0xD1342543DE82EF95ull;
    word = static_cast<uint32_t>(clock);
    if (draw == Draw::kPerStep) word &= (1u << 30) - 1;
    if (draw == Draw::kFrozen) word = 0;
  }

  // The Philox block of columns [4 group, 4 group + 4) of a logical row.
  AQN_DEVICE void block(uint32_t* words, uint64_t row, uint32_t group) const {
    words[0] = group;
    words[1] = static_cast<uint32_t>(row);
    words[2] = static_cast<uint32_t>(row >> 32);
    words[3] = word;
    philox4x32_10(words[0], words[1], words[2], words[3], static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  }

  AQN_DEVICE uint32_t one(uint64_t row, uint64_t column) const {
    uint32_t w[4];
    block(w, row, static_cast<uint32_t>(column / 4));
    const uint32_t i = static_cast<uint32_t>(column) % 4;
    return i < 2 ? (i == 0 ? w[0] : w[1]) : (i == 2 ? w[2] : w[3]);
  }
};

// The logical rows of a matrix: none for 0, 1, 2, ..., one number a row, or pairs of a row and its first column.
struct RowIds {
  const int64_t* at;
  int64_t pairs;

  AQN_DEVICE uint64_t row(int64_t r) const {
    return static_cast<uint64_t>(at == nullptr ? r : (pairs ? at[2 * r] : at[r]));
  }
  AQN_DEVICE uint64_t first(int64_t r) const { return pairs ? static_cast<uint64_t>(at[2 * r + 1]) : 0; }
};

AQN_DEVICE uint32_t picked(const uint32_t* at, int shift) {
  return shift < 2 ? (shift == 0 ? at[0] : at[1]) : (shift == 2 ? at[2] : at[3]);
}
AQN_DEVICE float picked(const float* at, int shift) {
  return shift < 2 ? (shift == 0 ? at[0] : at[1]) : (shift == 2 ? at[2] : at[3]);
}

// What columns [column, column + N) of a row draw, N a multiple of 4: whole Philox blocks, or parts of one more where
// the column is within one (which only Shifted allows).
template <bool Shifted, int N, class T, class Block>
AQN_DEVICE void drawn(T (&out)[N], uint64_t column, const Block& block) {
  const uint32_t group = static_cast<uint32_t>(column / 4);
  const int shift = Shifted ? static_cast<int>(column % 4) : 0;
  T all[N + 4];
#pragma unroll
  for (int g = 0; g < N / 4; ++g) block(all + 4 * g, group + g);
  if (Shifted && shift) block(all + N, group + N / 4);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = Shifted && shift ? picked(all + j, shift) : all[j];
}

template <bool Shifted, int N>
AQN_DEVICE void random_words(uint32_t (&words)[N], const Stream& s, uint64_t row, uint64_t column) {
  drawn<Shifted>(words, column, [&](uint32_t* w, uint32_t group) { s.block(w, row, group); });
}

template <bool Shifted, int N>
AQN_DEVICE void normals(float (&z)[N], const Stream& s, uint64_t row, uint64_t column) {
  drawn<Shifted>(z, column, [&](float* out, uint32_t group) {
    uint32_t w[4];
    s.block(w, row, group);
    box_muller(w[0], w[1], out[0], out[1]);
    box_muller(w[2], w[3], out[2], out[3]);
  });
}

}  // namespace aqn::cuda
