// What the kernels ask of the machine: 16 bytes at a time, loops over the grid, reductions across lanes.
//
// Kernels take raw addresses and know no torch. tests/cuda_host_shim.h gives them a grid of threads on the host.
#pragma once

#include "../core/bits.h"

#define AQN_DEVICE __device__ __forceinline__

namespace aqn::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // values in 16 bytes

AQN_DEVICE int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
AQN_DEVICE int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Two bfloat16 in a word, each the nearest of its value.
AQN_DEVICE uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  bf16 a, b;
  store(&a, low);
  store(&b, high);
  return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
#endif
}

// N values from an address that they are aligned to, at most 16 bytes at a time.
template <int N>
AQN_DEVICE void load_vector(float (&x)[N], const float* from) {
  const uint4* p = reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const uint4 w = p[i];
    x[4 * i] = float_of(w.x);
    x[4 * i + 1] = float_of(w.y);
    x[4 * i + 2] = float_of(w.z);
    x[4 * i + 3] = float_of(w.w);
  }
}

template <int N>
AQN_DEVICE void load_vector(float (&x)[N], const bf16* from) {
  const uint4* p = reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    const uint4 w = p[i];
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[8 * i + 2 * j] = float_of(words[j] << 16);
      x[8 * i + 2 * j + 1] = float_of(words[j] & 0xffff0000u);
    }
  }
}

template <int N>
AQN_DEVICE void store_vector(float* to, const float (&x)[N]) {
  uint4* p = reinterpret_cast<uint4*>(to);
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    p[i] = {bits_of(x[4 * i]), bits_of(x[4 * i + 1]), bits_of(x[4 * i + 2]), bits_of(x[4 * i + 3])};
}

template <int N>
AQN_DEVICE void store_vector(bf16* to, const float (&x)[N]) {
  if constexpr (N % 8 == 0) {
    uint4* p = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < N; i += 8)
      p[i / 8] = {bf16_pair(x[i], x[i + 1]), bf16_pair(x[i + 2], x[i + 3]), bf16_pair(x[i + 4], x[i + 5]),
                  bf16_pair(x[i + 6], x[i + 7])};
  } else {
    uint2* p = reinterpret_cast<uint2*>(to);
#pragma unroll
    for (int i = 0; i < N; i += 4) p[i / 4] = {bf16_pair(x[i], x[i + 1]), bf16_pair(x[i + 2], x[i + 3])};
  }
}

// A value as a tensor of T holds it.
AQN_DEVICE float held(float x, const float*) { return x; }
AQN_DEVICE float held(float x, const bf16*) { return float_of(bf16_pair(x, 0.0f) << 16); }

AQN_DEVICE void store_one(float* to, float x) { *to = x; }
AQN_DEVICE void store_one(bf16* to, float x) { to->bits = static_cast<uint16_t>(bf16_pair(x, 0.0f)); }

AQN_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
AQN_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The largest word of each group of `Lanes` neighbouring lanes of a warp. All lanes of the warp take part.
template <int Lanes>
AQN_DEVICE uint32_t largest_of_lanes(uint32_t word) {
#pragma unroll
  for (int step = 1; step < Lanes; step *= 2) word = larger(word, __shfl_xor_sync(0xffffffffu, word, step));
  return word;
}

// The largest word of a team of lanes: a warp, or the whole block.
template <int Team>
AQN_DEVICE uint32_t largest_of_team(uint32_t word) {
  word = largest_of_lanes<kWarp>(word);
  if constexpr (Team > kWarp) {
    __shared__ uint32_t of_warps[Team / kWarp];
    __syncthreads();  // what a former call left here was read
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = word;
    __syncthreads();
    word = 0;
#pragma unroll
    for (int w = 0; w < Team / kWarp; ++w) word = larger(word, of_warps[w]);
  }
  return word;
}

struct Quotient {
  int64_t whole, rest;
};

// n / d by 32-bit division where both fit, which is several times cheaper.
AQN_DEVICE Quotient divided(int64_t n, int64_t d) {
  if (((n | d) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
    return {q, static_cast<uint32_t>(n) - q * static_cast<uint32_t>(d)};
  }
  return {n / d, n % d};
}

}  // namespace aqn::cuda
