// One launch of the kernel in SOURCE. Standard input holds the memory that it may use, as regions
// (address, size, bytes), and its parameters; standard output gets the regions as they are then.
#include "cuda_on_cpu.h"

#include <cstdio>
#include <cstdlib>

#define gcx_centralize centralize_here
namespace here {
#include SOURCE
}
#undef gcx_centralize
#define gcx_centralize centralize_there
namespace there {
#include SOURCE
}

namespace {

// A region is as far from a multiple of 16 as it was, and ends where its allocation ends.
struct Region {
  std::uint64_t address, size;
  std::vector<char> allocation;

  char* memory() { return allocation.data() + address % 16; }
};

template <typename Value>
Value read() {
  Value value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::abort();
  return value;
}

Region read_region() {
  Region region{read<std::uint64_t>(), read<std::uint64_t>(), {}};
  region.allocation.resize(region.size + region.address % 16);
  if (std::fread(region.memory(), 1, region.size, stdin) != region.size) std::abort();
  return region;
}

template <typename Pointer>
Pointer found(std::vector<Region>& regions, std::uint64_t address) {
  for (auto& region : regions)
    if (region.address <= address && address < region.address + region.size)
      return reinterpret_cast<Pointer>(region.memory() + (address - region.address));
  return nullptr;
}

template <typename Arrays, typename Element>
Arrays moved(std::vector<Region>& regions, Arrays arrays) {
  for (auto& grad : arrays.grads)
    grad = found<const Element*>(regions, reinterpret_cast<std::uint64_t>(grad));
  for (auto& out : arrays.outs)
    out = found<Element*>(regions, reinterpret_cast<std::uint64_t>(out));
  return arrays;
}

}  // namespace

int main() {
  std::vector<Region> regions(read<std::uint64_t>());
  for (auto& region : regions) region = read_region();
  const auto blocks = read<std::uint64_t>();
  const auto addresses = read<here::Arrays>();
  const auto matrix_of_tile = found<const int*>(regions, read<std::uint64_t>());
  const auto matrices = read<std::uint64_t>();
  const auto partials = found<here::Wide*>(regions, read<std::uint64_t>());
  const auto counters = found<unsigned*>(regions, read<std::uint64_t>());
  const auto strength = read<here::Wide>();

  const auto arrays_here = moved<here::Arrays, here::Element>(regions, addresses);
  there::Arrays arrays_there;
  std::memcpy(&arrays_there, &arrays_here, sizeof arrays_there);
  launch(
      blocks, THREADS,
      [&] {
        here::centralize_here(arrays_here, matrix_of_tile,
                              found<const here::Matrix*>(regions, matrices), partials, counters,
                              strength);
      },
      [&] {
        there::centralize_there(arrays_there, matrix_of_tile,
                                found<const there::Matrix*>(regions, matrices), partials, counters,
                                strength);
      });
  for (auto& region : regions) std::fwrite(region.memory(), 1, region.size, stdout);
}
