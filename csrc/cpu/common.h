// What the kernels share: sums of what they measured, loads and stores of whole arrays, and the loop over chunks. Part
// of each instruction set's translation unit, inside its namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace aqn::cpu::AQN_ISA {
namespace {

constexpr int kLanes = 16;

// Partial sums in lanes. Squares are made and added in fp64, where those of all finite fp32 values are finite and not
// 0.
struct Sums {
  double error2[kLanes] = {}, reference2[kLanes] = {}, injected2[kLanes] = {};
  int32_t changed[kLanes] = {}, saturated[kLanes] = {}, nonfinite[kLanes] = {}, injected_n[kLanes] = {};
  int64_t hits = 0;

  void flush(Stats& s, int64_t count) {
    s.count += static_cast<double>(count);
    s.hits += static_cast<double>(hits);
    for (int j = 0; j < kLanes; ++j) {
      s.error2 += error2[j];
      s.reference2 += reference2[j];
      s.injected2 += injected2[j];
      s.changed += changed[j];
      s.saturated += saturated[j];
      s.nonfinite += nonfinite[j];
      s.injected_n += injected_n[j];
    }
    *this = Sums();
  }
};

inline void add(Stats& t, const Stats& p) {
  t.count += p.count;
  t.changed += p.changed;
  t.error2 += p.error2;
  t.reference2 += p.reference2;
  t.injected2 += p.injected2;
  t.injected_n += p.injected_n;
  t.saturated += p.saturated;
  t.nonfinite += p.nonfinite;
  t.hits += p.hits;
}

Stats total(const std::vector<Stats>& parts) {
  Stats t;
  for (const Stats& p : parts) add(t, p);
  return t;
}

// body(i, lane) for n values, a fixed number of lanes at a time: a loop of known length is what compilers vectorise
// best.
template <class Body>
AQN_HD void in_lanes(int n, const Body& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) body(i + j, j);
  }
  for (int j = 0; i + j < n; ++j) body(i + j, j);
}

template <class T>
AQN_HD void load_all(float* to, const T* from, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class T>
AQN_HD void store_all(T* to, const float* from, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) store(to + i, from[i]);
}

// Results that the caches cannot hold go past them: a cache line that is written whole need not be read first. `to` and
// `from` do not overlap; whoever streams calls end_stream() when done.
constexpr int64_t kStreamFrom = 16 << 20;  // bytes

AQN_HD void copy_out(void* to, const void* from, size_t bytes, bool past_caches) {
#if defined(__SSE2__)
  if (past_caches && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    for (; bytes >= 64; bytes -= 64, out += 64, in += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#else
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
    }
    to = out;
    from = in;
  }
#endif
  if (bytes) std::memcpy(to, from, bytes);
}

AQN_HD void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class Body>
void for_chunks(int64_t chunks, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) body(c);
}

}  // namespace
}  // namespace aqn::cpu::AQN_ISA
