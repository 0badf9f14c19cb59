// What a kernel measured of its own effect: sums in fp64, where the squares of all finite fp32 values are finite and
// not 0. Only measured kernels have them; no other kernel holds an fp64 instruction.
//
// Every block adds in one order and writes one row of `parts`; finish() adds the rows in one order. The host gives a
// measured kernel the same grid on every device, so that receipts depend on neither device nor schedule.
#pragma once

#include "../core/error.h"
#include "device.cuh"

namespace aqn::cuda {

constexpr int kSums = 8;       // changed, error2, reference2, injected2, injected_n, saturated, nonfinite, hits
constexpr int kSegments = 32;  // of kThreads values, or of rows, added apart

struct Sums {
  double error2 = 0, reference2 = 0, injected2 = 0;
  uint32_t changed = 0, injected_n = 0, saturated = 0, nonfinite = 0, hits = 0;

  // What a cast did to one value: x in, y stored, and what was rounded to the element format.
  AQN_DEVICE void cast(float x, float y, float scaled, float highest, float lowest) {
    const bool finite = is_finite(x) & is_finite(y);  // one Inf must not spoil the sums of all others
    const double from = finite ? x : 0.0f, to = finite ? y : 0.0f, e = to - from;
    error2 += e * e;
    reference2 += from * from;
    changed += differs(y, x) ? 1 : 0;
    saturated += (scaled > highest) | (scaled < lowest) ? 1 : 0;
    nonfinite += is_finite(y) ? 0 : 1;
  }

  // What a perturbation did to one value: before and after in fp32, the two as the output holds them, and what is
  // injected in units of.
  AQN_DEVICE void perturb(float before, float after, float clean, float stored, float unit) {
    const bool finite = is_finite(stored), comparable = finite & is_finite(clean);
    const bool sound = is_finite(before) & is_finite(unit) & (unit != 0.0f);
    const float share = (after - before) / (sound ? unit : 1.0f);
    const bool measurable = sound & is_finite(share);
    const double half = comparable ? 0.5f * stored - 0.5f * clean : 0.0f;  // of the error, which may exceed fp32
    const double reference = finite ? before : 0.0f, injected = measurable ? share : 0.0f;
    error2 += 4 * half * half;
    reference2 += reference * reference;
    injected2 += injected * injected;
    injected_n += measurable ? 1 : 0;
    changed += differs(stored, clean) ? 1 : 0;
    nonfinite += finite ? 0 : 1;
  }

  // The sums of a block's threads, as row blockIdx.x of parts. Every thread calls this once, at the end.
  AQN_DEVICE void write(double* parts) const {
    __shared__ double of_threads[kSums][kThreads], of_segments[kSums][kSegments];
    const double mine[kSums] = {static_cast<double>(changed),
                                error2,
                                reference2,
                                injected2,
                                static_cast<double>(injected_n),
                                static_cast<double>(saturated),
                                static_cast<double>(nonfinite),
                                static_cast<double>(hits)};
#pragma unroll
    for (int s = 0; s < kSums; ++s) of_threads[s][threadIdx.x] = mine[s];
    __syncthreads();
    const int sum = threadIdx.x / kSegments, segment = threadIdx.x % kSegments;
    double total = 0;
    for (int i = segment; i < kThreads; i += kSegments) total += of_threads[sum][i];
    of_segments[sum][segment] = total;
    __syncthreads();
    if (threadIdx.x >= kSums) return;
    total = 0;
    for (int i = 0; i < kSegments; ++i) total += of_segments[threadIdx.x][i];
    parts[static_cast<int64_t>(blockIdx.x) * kSums + threadIdx.x] = total;
  }
};

struct FinishArgs {
  const double* parts;
  double* stats;  // STATS of aqnsim/receipts.py
  int64_t rows;
  double count, sigma2, rate;  // elements, and what was asked for: of each measurable one, of each
};

// One block of kThreads: 8 sums, each in 32 segments.
AQN_DEVICE void finish(const FinishArgs& a) {
  __shared__ double of_segments[kSums][kSegments], total[kSums];
  const int sum = threadIdx.x / kSegments, segment = threadIdx.x % kSegments;
  double mine = 0;
  for (int64_t r = segment; r < a.rows; r += kSegments) mine += a.parts[r * kSums + sum];
  of_segments[sum][segment] = mine;
  __syncthreads();
  if (threadIdx.x < kSums) {
    mine = 0;
    for (int i = 0; i < kSegments; ++i) mine += of_segments[threadIdx.x][i];
    total[threadIdx.x] = mine;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  a.stats[0] = 1;
  a.stats[1] = a.count;
  for (int i = 0; i < kSums; ++i) a.stats[2 + i] = total[i];
  a.stats[10] = a.sigma2 * total[4];
  a.stats[11] = a.rate * a.count;
}

}  // namespace aqn::cuda
