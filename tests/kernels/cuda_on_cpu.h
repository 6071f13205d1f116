// CUDA on a CPU: a thread for each CUDA thread of a block, and barriers where CUDA has them.
//
// Slow, exact as IEEE 754 has it, and without order where CUDA gives none: what one thread reads of
// another without a barrier or a fence between them is a race that the thread sanitizer reports.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define ON_CPU
#define EXACTLY(name, sign, instruction, number, letter) \
  inline number name(number a, number b) { return a sign b; }

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // so a block at a time goes through a copy of the source

struct Index {
  unsigned x;
};

struct Block {
  static constexpr unsigned WARP = 32;
  pthread_barrier_t all;
  std::vector<pthread_barrier_t> warps;
  std::vector<double> lanes;

  explicit Block(unsigned threads) : warps(threads / WARP), lanes(threads) {
    pthread_barrier_init(&all, nullptr, threads);
    for (auto& warp : warps) pthread_barrier_init(&warp, nullptr, WARP);
  }
};

inline thread_local Index threadIdx, blockIdx;
inline thread_local Block* block;
inline thread_local bool has_used_atomics;
inline std::atomic<int> fences;

inline void __syncthreads() { pthread_barrier_wait(&block->all); }

template <typename Number>
Number __shfl_xor_sync(unsigned, Number number, unsigned distance) {
  auto& warp = block->warps[threadIdx.x / Block::WARP];
  block->lanes[threadIdx.x] = number;
  pthread_barrier_wait(&warp);
  const auto other = static_cast<Number>(block->lanes[threadIdx.x ^ distance]);
  pthread_barrier_wait(&warp);
  return other;
}

// An atomic operation alone brings no order. A fence before it lets others see what this thread
// did, and a fence after it lets this thread see what they did.
inline void __threadfence() {
  if (has_used_atomics) fences.load(std::memory_order_acquire);
  has_used_atomics = false;
  fences.fetch_add(1, std::memory_order_release);
}

inline unsigned atomicInc(unsigned* counter, unsigned last) {
  unsigned old = __atomic_load_n(counter, __ATOMIC_RELAXED), next;
  do next = old >= last ? 0 : old + 1;
  while (!__atomic_compare_exchange_n(counter, &old, next, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  has_used_atomics = true;
  return old;
}

struct __half {
  _Float16 number;
};
inline float __half2float(__half x) { return static_cast<float>(x.number); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Runs blocks in as many places at once as there are copies of the kernel, each with its own
// shared memory.
template <typename... Kernels>
void launch(unsigned blocks, unsigned threads, const Kernels&... copies) {
  constexpr unsigned PLACES = sizeof...(copies);
  std::vector<std::thread> all;
  std::vector<Block> places;
  places.reserve(PLACES);
  unsigned place = 0;
  const auto start = [&](const auto& kernel) {
    Block* mine = &places.emplace_back(threads);
    for (unsigned thread = 0; thread < threads; thread++)
      all.emplace_back([=, &kernel] {
        block = mine;
        threadIdx = {thread};
        for (unsigned number = place; number < blocks; number += PLACES) {
          blockIdx = {number};
          has_used_atomics = false;
          kernel();
          __syncthreads();
        }
      });
    place++;
  };
  (start(copies), ...);
  for (auto& thread : all) thread.join();
}
