// All kernels of SOURCE with one RULE for one ELEMENT, as a library; emulated_cuda.py calls it.
#include "cuda_on_cpu.h"

#define MATRICES 1024  // more than any launch has
#include SOURCE
#undef reinterpret_cast

#include <string>

namespace {

using Wanted = Work<RULE>;
Wanted work;

// Reads the parameters of a kernel that was compiled for fewer matrices, as a compiler lays them out.
struct Reader {
  const char* start;
  size_t offset;

  template <typename T> void take(T* to, size_t count) {
    offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
    if (start) std::memcpy(to, start + offset, count * sizeof(T));
    offset += count * sizeof(T);
  }
};

size_t read_work(const void* parameters, size_t matrices) {
  Reader reader{static_cast<const char*>(parameters), 0};
  reader.take(work.matrix, matrices);
  for (auto& arrays : work.arrays) reader.take(arrays, matrices);
  reader.take(work.first_tile, matrices);
  reader.take(&work.strength, 1);
  reader.take(&work.rate, 1);
  reader.take(work.numbers, 7);
  reader.take(&work.partials, 1);
  reader.take(&work.matrices, 1);
  return (reader.offset + 15) / 16 * 16;
}

template <typename Kernel> const char* launch(unsigned blocks, unsigned threads, bool falling) {
  if (threads != Kernel::THREADS) return "this kernel has another number of threads";
  const auto run = [](const void* parameters) {
    Kernel::run(*static_cast<const Wanted*>(parameters));
  };
  return emulated::launch(blocks, threads, falling, run, &work);
}

}  // namespace

extern "C" const char* emulate(const char* kernel, int matrices, unsigned blocks, unsigned threads,
                               bool falling, const void* parameters, emulated::Counts* counts) {
  if (read_work(nullptr, MATRICES) != sizeof(Wanted)) return "the parameters hold something else";
  read_work(parameters, matrices);
  if (work.matrices > matrices) return "more matrices than the kernel was compiled for";
  const char* fault = "there is no such kernel";
#define CASE(name) \
  if (std::string(kernel) == #name) fault = launch<name<RULE>>(blocks, threads, falling);
  CASE(rows) CASE(long_rows) CASE(columns) CASE(column_sums) CASE(split_columns) CASE(flat)
  *counts = emulated::counts;
  return fault;
}
