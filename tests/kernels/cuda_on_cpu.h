// CUDA on a CPU: each CUDA thread is a fiber, which runs until it has to wait.
//
// A result is the same in each run, as all is one thread of the machine. So no tool sees a race;
// the order shows it instead. Blocks run one after the other, and a warp runs from one barrier to the
// next before another warp starts. Order is rising or falling: of two warps between the same
// barriers, and of two blocks, each comes first once. If they race, one of the results is wrong.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

struct Index { unsigned x; };
inline Index threadIdx, blockIdx, gridDim;

namespace emulated {

enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };
constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf place;
  bool has_started = false;
  State state = READY;
  int turn = 0;         // of two slots, so that a lane can go on to its next shuffle
  double given[2];
};

struct Counts { long long packed, elementwise; };  // accesses to memory

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::vector<char> memory;  // shared by a block, and as large as it asks for
inline void (*body)(const void*);
inline const void* argument;
inline const char* fault;
inline Counts counts;

// These two save no mask of signals, unlike swapcontext, and take a twentieth of its time.
inline void wait(State state) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = state;
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
}
inline void run_blocks() {
  for (;;) {
    body(argument);
    wait(DONE);
  }
}
inline void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.has_started) _longjmp(fiber.place, 1);
  fiber.has_started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_blocks, 0);
  setcontext(&fiber.start);
}

// Lets a warp run until all of it has come to a barrier or to the end.
inline void run_warp(unsigned first, bool falling) {
  for (;;) {
    unsigned waiting = 0;
    for (unsigned n = 0; n < WARP; n++) {
      const unsigned thread = first + (falling ? WARP - 1 - n : n);
      if (fibers[thread].state == READY) resume(thread);
      waiting += fibers[thread].state == AT_SHUFFLE;
    }
    if (!waiting) return;
    if (waiting < WARP) fault = "a shuffle that not all lanes of a warp reach";
    if (fault) return;
    for (unsigned n = 0; n < WARP; n++) fibers[first + n].state = READY;
  }
}

inline void run_block(unsigned threads, bool falling) {
  memory.clear();
  for (unsigned t = 0; t < threads; t++) fibers[t].state = READY;
  for (;;) {
    for (unsigned n = 0; n < threads; n += WARP) {
      run_warp(falling ? threads - WARP - n : n, falling);
      if (fault) return;
    }
    unsigned waiting = 0;
    for (unsigned t = 0; t < threads; t++) waiting += fibers[t].state == AT_BARRIER;
    if (!waiting) return;
    if (waiting < threads) fault = "a barrier that not all threads of a block reach";
    if (fault) return;
    for (unsigned t = 0; t < threads; t++) fibers[t].state = READY;
  }
}

// Returns a description of what went wrong, or null.
inline const char* launch(unsigned blocks, unsigned threads, bool falling,
                          void (*kernel)(const void*), const void* work) {
  body = kernel;
  argument = work;
  fault = nullptr;
  counts = {};
  gridDim.x = blocks;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (unsigned n = 0; n < blocks && !fault; n++) {
    blockIdx.x = falling ? blocks - 1 - n : n;
    run_block(threads, falling);
  }
  if (fault) fibers.clear();  // they are in the middle of something
  return fault;
}

template <typename T> T* shared(size_t size) {
  if (memory.empty()) memory = std::vector<char>(size * sizeof(T), char(0xff));  // NaNs
  return reinterpret_cast<T*>(memory.data());
}

template <typename To, typename From> To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// All accesses to arrays go through a cast, and so through here.
template <typename To, typename From> To cast(From* from) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  if constexpr (!std::is_pointer_v<To>) {
    return address;
  } else {
    constexpr size_t SIZE = sizeof(std::remove_pointer_t<To>);
    if (address % SIZE) {
      fault = "a misaligned access";
      wait(AT_SHUFFLE);  // for ever
    }
    (SIZE == 16 ? counts.packed : counts.elementwise)++;
    return reinterpret_cast<To>(from);
  }
}

inline unsigned half_bits(float x) {
  return x != x ? 0x7fff : bits_of<std::uint16_t>(static_cast<_Float16>(x));
}
inline unsigned bfloat_bits(float x) {
  const unsigned bits = bits_of<unsigned>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::AT_BARRIER); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int distance) {
  auto& mine = emulated::fibers[threadIdx.x];
  const int turn = mine.turn ^= 1;
  mine.given[turn] = x;
  emulated::wait(emulated::AT_SHUFFLE);
  return static_cast<T>(emulated::fibers[threadIdx.x ^ distance].given[turn]);
}

inline float __uint_as_float(unsigned x) { return emulated::bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits_of<unsigned>(x); }
inline double __hiloint2double(unsigned high, unsigned low) {
  return emulated::bits_of<double>(std::uint64_t(high) << 32 | low);
}
inline int __double2loint(double x) { return int(emulated::bits_of<std::uint64_t>(x)); }
inline int __double2hiint(double x) { return int(emulated::bits_of<std::uint64_t>(x) >> 32); }
inline float half_to_float(unsigned short x) { return emulated::bits_of<_Float16>(x); }
inline unsigned halves(float low, float high) {
  return emulated::half_bits(high) << 16 | emulated::half_bits(low);
}
inline unsigned bfloats(float low, float high) {
  return emulated::bfloat_bits(high) << 16 | emulated::bfloat_bits(low);
}
using std::fma;
using std::sqrt;

#define ON_CPU
#define DEVICE inline
#define SHARED(type, name, size) type* const name = emulated::shared<type>(size)
#define OPAQUE(word) (void)(word)
#define reinterpret_cast emulated::cast
