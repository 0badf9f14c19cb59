// A grid of CUDA threads on the host, for tests: the threads of a block are fibers of one thread, which take turns.
//
// A fiber runs until it needs what others say: at a shuffle or a barrier. All of a warp's fibers make the same
// shuffles, so each round through the block brings a warp one exchange further; barriers open between rounds.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(n)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  uint32_t x;
};
static Index threadIdx, blockIdx, gridDim;

namespace shim {

constexpr int kFibers = 256, kStack = 1 << 18;

struct Fiber {
  jmp_buf at;
  ucontext_t entry;
  bool started, done;
  int parity;
};

static Fiber fibers[kFibers];
static jmp_buf scheduler;
static uint32_t exchanged[2][kFibers];
static int turn, waiting;
static uint64_t opened;
static void (*body)(const void*);
static const void* arguments;

inline void yield() {
  if (_setjmp(fibers[turn].at) == 0) _longjmp(scheduler, 1);
}

static void live() {
  for (;;) {
    body(arguments);
    fibers[turn].done = true;
    yield();
  }
}

static void resume(Fiber& f) {
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.entry);
  f.entry.uc_stack.ss_sp = std::malloc(kStack);
  f.entry.uc_stack.ss_size = kStack;
  makecontext(&f.entry, live, 0);
  setcontext(&f.entry);
}

static void run_block() {
  for (Fiber& f : fibers) f.done = false;
  for (int left = kFibers; left > 0;) {
    left = 0;
    for (turn = 0; turn < kFibers; ++turn) {
      if (fibers[turn].done) continue;
      threadIdx.x = static_cast<uint32_t>(turn);
      resume(fibers[turn]);
      left += fibers[turn].done ? 0 : 1;
    }
    if (left && waiting == left) {
      waiting = 0;
      ++opened;
    }
  }
}

inline void run(void (*kernel)(const void*), const void* args, int blocks) {
  body = kernel;
  arguments = args;
  gridDim.x = static_cast<uint32_t>(blocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
}

}  // namespace shim

inline void __syncthreads() {
  const uint64_t before = shim::opened;
  ++shim::waiting;
  while (shim::opened == before) shim::yield();
}

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t word, int lanes) {
  const int me = shim::turn, parity = shim::fibers[me].parity;
  shim::fibers[me].parity = 1 - parity;
  shim::exchanged[parity][me] = word;
  shim::yield();
  return shim::exchanged[parity][me ^ lanes];
}

inline void atomicMax(uint32_t* to, uint32_t x) {
  if (x > *to) *to = x;
}
