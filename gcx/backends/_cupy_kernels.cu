// Gradient Centralization of many arrays in one launch, for one type of ELEMENT.
//
// A block takes a tile of a matrix: up to THREADS * PER_THREAD elements, which it reads once, holds
// in registers, and writes once. Sums are in the canonical order that _canonical.py defines, so no
// bit of a result depends on how a matrix is cut into tiles. What is in the tables, and which
// THREADS, PER_THREAD, COLUMNS, SEGMENT and ARRAYS there are, is up to _cupy_kernels.py.

#ifndef ON_CPU  // where tests run this file
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// An operation as PTX has it. CuPy compiles with -ftz=true, which makes C, and even intrinsics like
// __fadd_rn, take subnormal numbers for zero; and no compiler contracts or approximates these.
#define EXACTLY(name, sign, instruction, number, letter)                                    \
  __device__ inline number name(number a, number b) {                                       \
    number result;                                                                          \
    asm(instruction " %0, %1, %2;" : "=" letter(result) : letter(a), letter(b));            \
    return result;                                                                          \
  }
#endif

EXACTLY(add, +, "add.rn.f32", float, "f")
EXACTLY(add, +, "add.rn.f64", double, "d")
EXACTLY(subtract, -, "sub.rn.f32", float, "f")
EXACTLY(subtract, -, "sub.rn.f64", double, "d")
EXACTLY(multiply, *, "mul.rn.f32", float, "f")
EXACTLY(multiply, *, "mul.rn.f64", double, "d")
EXACTLY(divide, /, "div.rn.f32", float, "f")
EXACTLY(divide, /, "div.rn.f64", double, "d")

__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }

using Element = ELEMENT;
using Wide = decltype(widen(Element()));  // what sums are in

constexpr int WARP = 32;
constexpr int TILE = THREADS * PER_THREAD;
constexpr int PANEL_ROWS = TILE / COLUMNS;
constexpr int BLOCKS = sizeof(Wide) == 8 ? 2 : 3;  // at a time on a multiprocessor: all registers
constexpr int PACK = 16 / sizeof(Element);  // elements that a thread moves at a time, at best
constexpr Wide NOTHING = -0.0;              // changes no sum, not even that of zeros

static_assert(SEGMENT == 4 * TILE, "long_row cuts a segment into quarters");
static_assert(SEGMENT <= PANEL_ROWS * PANEL_ROWS, "finish_panel reads a segment's sums at once");

struct alignas(16) Pack {
  Element elements[PACK];
};

// The arrays, by value in the parameters of the kernel: other addresses cost no transfer.
struct Arrays {
  const Element* grads[ARRAYS];
  Element* outs[ARRAYS];
};

// A `_matrices.Matrix` of an array, and how it is cut into tiles.
struct Matrix {
  long long offset, unit_step, inner_step, outer_step;
  long long first_partial;  // of its columns, if they are split: place of the partial sums,
  int first_counter;        // and of the counters
  int array, first_tile;
  int units, fan_in, inner;
  unsigned reciprocal;  // element / inner == element * reciprocal >> shift
  int shift;
  int lanes;   // threads that share a row; 0 for columns
  int splits;  // of columns: tiles that share a segment
  int packed;  // whether the steps leave packs where they can be moved at once
};

struct Job {
  const Element* grad;
  Element* out;
  Matrix matrix;
  int tile;  // of the matrix
  Wide strength;
};

// Elements which are neighbours in memory: where the first is, and how many are there.
struct Spot {
  long long place;
  int count;
};

// The same number, of which the compiler knows nothing more.
__device__ inline int afresh(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

__device__ inline int clamped(int count, int most) {
  return count < 0 ? 0 : count < most ? count : most;
}

__device__ inline long long place_in_fan_in(const Matrix& matrix, int element) {
  const int run = static_cast<unsigned long long>(element) * matrix.reciprocal >> matrix.shift;
  return run * matrix.outer_step + (element - run * matrix.inner) * matrix.inner_step;
}

// A tile of rows, as one thread sees it: LANES threads share a row, from element `first` on; of
// what they take at a time it is every `step`th.
template <int V, int LANES>
struct RowWalk {
  const Matrix& matrix;
  int unit, first, step;

  __device__ Spot operator()(int k) const {
    const int element = first + (k * step * LANES + threadIdx.x % LANES) * V;
    const int end = unit < matrix.units ? matrix.fan_in : 0;
    const long long place = V > 1 ? element : place_in_fan_in(matrix, element);
    return {matrix.offset + unit * matrix.unit_step + place, clamped(end - element, V)};
  }
};

// A tile of a panel of columns: every `splits`th row of a segment, which is a part of its tree.
template <int V>
struct ColumnWalk {
  static constexpr int LANES = COLUMNS / V;  // threads that share a row of the panel
  const Matrix& matrix;
  int panel, tile;

  __device__ int column() const { return threadIdx.x % LANES * V; }

  __device__ Spot operator()(int k) const {
    const int segment = tile / matrix.splits, split = tile % matrix.splits;
    const int row = k * (THREADS / LANES) + threadIdx.x / LANES;
    const int element = segment * SEGMENT + row * matrix.splits + split;
    const int unit = panel * COLUMNS + column();
    const int count = element < matrix.fan_in ? clamped(matrix.units - unit, V) : 0;
    return {matrix.offset + unit + place_in_fan_in(matrix, element), count};
  }
};

// What a thread holds of a tile: packs of V elements, one after the other.
using Share = Wide[PER_THREAD];

template <int V, typename Walk>
__device__ inline void load(Share& share, const Element* from, const Walk& walk) {
#pragma unroll
  for (int k = 0; k < PER_THREAD / V; k++) {
    const Spot spot = walk(k);
    if (V > 1 && spot.count == V) {
      const Pack pack = *reinterpret_cast<const Pack*>(from + spot.place);
#pragma unroll
      for (int v = 0; v < V; v++) share[k * V + v] = widen(pack.elements[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++)
        share[k * V + v] = v < spot.count ? widen(from[spot.place + v]) : NOTHING;
    }
  }
}

template <int V, typename Walk>
__device__ inline void store(const Share& share, const Wide (&means)[V], Element* to,
                             const Walk& walk) {
  const int start = afresh(0);  // else all places are kept from `load` on, beyond the registers
#pragma unroll
  for (int k = 0; k < PER_THREAD / V; k++) {
    const Spot spot = walk(start + k);
    Pack pack;
#pragma unroll
    for (int v = 0; v < V; v++) narrow(subtract(share[k * V + v], means[v]), pack.elements[v]);
    if (V > 1 && spot.count == V) {
      *reinterpret_cast<Pack*>(to + spot.place) = pack;
    } else {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (v < spot.count) to[spot.place + v] = pack.elements[v];
    }
  }
}

template <int V>
__device__ inline void fill(Wide (&numbers)[V], Wide number) {
#pragma unroll
  for (int v = 0; v < V; v++) numbers[v] = number;
}

// The halving tree, until the first WIDTH numbers are left.
template <int WIDTH, int LENGTH>
__device__ inline void halve(Wide (&numbers)[LENGTH]) {
#pragma unroll
  for (int half = LENGTH / 2; half >= WIDTH; half /= 2)
#pragma unroll
    for (int n = 0; n < half; n++) numbers[n] = add(numbers[n], numbers[n + half]);
}

// The halving tree over SPAN threads that stand together, down to the first STEP of them; then all
// of them hold the sums, as an addition is the same from both sides.
template <int SPAN, int STEP, int V>
__device__ inline void halve_threads(Wide (&sums)[V], Wide* shared) {
  if constexpr (SPAN > WARP) {
#pragma unroll
    for (int v = 0; v < V; v++) shared[v * THREADS + threadIdx.x] = sums[v];
    __syncthreads();
    const int first = threadIdx.x / SPAN * SPAN + threadIdx.x % WARP;
#pragma unroll
    for (int v = 0; v < V; v++) {
      Wide warps[SPAN / WARP];
#pragma unroll
      for (int w = 0; w < SPAN / WARP; w++) warps[w] = shared[v * THREADS + first + w * WARP];
      halve<1>(warps);
      sums[v] = warps[0];
    }
  }
#pragma unroll
  for (int half = (SPAN < WARP ? SPAN : WARP) / 2; half >= STEP; half /= 2)
#pragma unroll
    for (int v = 0; v < V; v++)
      sums[v] = add(sums[v], __shfl_xor_sync(0xffffffffu, sums[v], half));
}

// The first part of the tree over a tile: over the packs of a thread, down to one pack of sums.
template <int V>
__device__ inline void halve_packs(Wide (&sums)[V], const Share& share) {
  constexpr int HALF = PER_THREAD / 2;
  Wide numbers[HALF];
#pragma unroll
  for (int n = 0; n < HALF; n++) numbers[n] = add(share[n], share[n + HALF]);
  halve<V>(numbers);
#pragma unroll
  for (int v = 0; v < V; v++) sums[v] = numbers[v];
}

// What is left of it for rows: over the threads of a row, and the elements of a pack.
template <int LANES, int V>
__device__ inline Wide sum_of_row(Wide (&sums)[V], Wide* shared) {
  halve_threads<LANES, 1>(sums, shared);
  halve<1>(sums);
  return sums[0];
}

__device__ inline Wide scaled_mean(const Job& job, Wide sum) {
  return multiply(divide(sum, static_cast<Wide>(job.matrix.fan_in)), job.strength);
}

// Several rows, each of them in the registers of LANES threads.
template <int V, int LANES>
__device__ inline void rows(const Job& job, Wide* shared) {
  const int unit = job.tile * (THREADS / LANES) + threadIdx.x / LANES;
  const RowWalk<V, LANES> walk{job.matrix, unit, 0, 1};
  Share share;
  load<V>(share, job.grad, walk);
  Wide sums[V], means[V];
  halve_packs(sums, share);
  fill(means, scaled_mean(job, sum_of_row<LANES>(sums, shared)));
  store(share, means, job.out, walk);
}

template <int V>
__device__ inline void add_to(Wide (&sums)[V], const Wide (&others)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) sums[v] = add(sums[v], others[v]);
}

// The first part of the tree over a quarter of a segment, which has every fourth of its packs.
template <int V>
__device__ inline void halve_quarter(Wide (&sums)[V], const Job& job, int segment, int quarter) {
  const int first = segment + quarter * THREADS * V;
  Share share;
  load<V>(share, job.grad, RowWalk<V, THREADS>{job.matrix, job.tile, first, 4});
  halve_packs(sums, share);
}

// A row longer than a tile: summed segment by segment, then read again, from a cache.
template <int V>
__device__ inline void long_row(const Job& job, Wide* shared) {
  Wide total = NOTHING;
  for (int segment = 0; segment < job.matrix.fan_in; segment += SEGMENT) {
    Wide sums[V];
    fill(sums, NOTHING);
#pragma unroll 1  // since there are no registers for more than a quarter
    for (int odd = 0; odd < 2; odd++) {
      Wide pair[V];
      fill(pair, NOTHING);
#pragma unroll 1
      for (int quarter = odd; quarter < 4; quarter += 2) {
        Wide other[V];
        halve_quarter(other, job, segment, quarter);
        add_to(pair, other);
      }
      add_to(sums, pair);
    }
    total = add(total, sum_of_row<THREADS>(sums, shared));
    __syncthreads();  // before the next segment's sums go where these were read
  }
  Wide means[V];
  fill(means, scaled_mean(job, total));
  for (int first = 0; first < job.matrix.fan_in; first += TILE) {
    const RowWalk<V, THREADS> walk{job.matrix, job.tile, first, 1};
    Share share;
    load<V>(share, job.grad, walk);
    store(share, means, job.out, walk);
  }
}

// Whether this block is the last of `blocks` to come here. Then it sees what all of them wrote to
// memory before, and nobody has waited for anybody. The counter is 0 before and after.
__device__ inline bool arrives_last(unsigned* counter, unsigned blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(counter, blocks - 1) == blocks - 1;
    if (is_last) __threadfence();
  }
  __syncthreads();
  return is_last;
}

// A panel whose tiles have all left their sums at `partials`: adds them up, reads the panel again.
template <int V>
__device__ inline void finish_panel(const Job& job, int panel, int tiles, const Wide* partials,
                                    Wide* shared) {
  constexpr int LANES = ColumnWalk<V>::LANES;
  const int splits = job.matrix.splits, column = threadIdx.x % LANES * V;
  Wide means[V];
  fill(means, NOTHING);
  for (int first = 0; first < tiles; first += splits) {
    Share share;
#pragma unroll
    for (int k = 0; k < PER_THREAD / V; k++) {
      const int split = k * (THREADS / LANES) + threadIdx.x / LANES;
#pragma unroll
      for (int v = 0; v < V; v++)
        share[k * V + v] =
            split < splits ? partials[(first + split) * COLUMNS + column + v] : NOTHING;
    }
    Wide sums[V];
    halve_packs(sums, share);
    halve_threads<THREADS, LANES>(sums, shared);
    add_to(means, sums);
    __syncthreads();  // before the next segment's sums go where these were read
  }
#pragma unroll
  for (int v = 0; v < V; v++) means[v] = scaled_mean(job, means[v]);
  for (int tile = 0; tile < tiles; tile++) {
    const ColumnWalk<V> walk{job.matrix, panel, tile};
    Share share;
    load<V>(share, job.grad, walk);
    store(share, means, job.out, walk);
  }
}

template <int V>
__device__ inline void columns(const Job& job, Wide* partials, unsigned* counters, Wide* shared) {
  constexpr int LANES = ColumnWalk<V>::LANES;
  const Matrix& matrix = job.matrix;
  const int segments = matrix.fan_in > SEGMENT ? (matrix.fan_in + SEGMENT - 1) / SEGMENT : 1;
  const int tiles = segments * matrix.splits;  // of a panel
  const int panel = job.tile / tiles, tile = job.tile % tiles;
  const ColumnWalk<V> walk{matrix, panel, tile};
  Share share;
  load<V>(share, job.grad, walk);
  Wide sums[V];
  halve_packs(sums, share);
  halve_threads<THREADS, LANES>(sums, shared);
  if (tiles == 1) {
#pragma unroll
    for (int v = 0; v < V; v++) sums[v] = scaled_mean(job, sums[v]);
    store(share, sums, job.out, walk);
    return;
  }
  partials += (matrix.first_partial + static_cast<long long>(panel) * tiles) * COLUMNS;
  if (threadIdx.x < LANES)
#pragma unroll
    for (int v = 0; v < V; v++) partials[tile * COLUMNS + walk.column() + v] = sums[v];
  if (arrives_last(counters + matrix.first_counter + panel, tiles))
    finish_panel<V>(job, panel, tiles, partials, shared);
}

template <int V>
__device__ inline void centralize_tile(const Job& job, Wide* partials, unsigned* counters) {
  __shared__ Wide shared[V * THREADS];
  switch (job.matrix.lanes) {
    case 0: return columns<V>(job, partials, counters, shared);
    case 4: return rows<V, 4>(job, shared);
    case 16: return rows<V, 16>(job, shared);
    case 64: return rows<V, 64>(job, shared);
    default:
      return job.matrix.fan_in > TILE ? long_row<V>(job, shared) : rows<V, THREADS>(job, shared);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gcx_centralize(const Arrays arrays, const int* matrix_of_tile, const Matrix* matrices,
                   Wide* partials, unsigned* counters, Wide strength) {
  const Matrix matrix = matrices[matrix_of_tile[blockIdx.x]];
  const Job job{arrays.grads[matrix.array], arrays.outs[matrix.array], matrix,
                static_cast<int>(blockIdx.x) - matrix.first_tile, strength};
  const auto addresses = reinterpret_cast<size_t>(job.grad) | reinterpret_cast<size_t>(job.out);
  if (matrix.packed && addresses % sizeof(Pack) == 0)
    centralize_tile<PACK>(job, partials, counters);
  else
    centralize_tile<1>(job, partials, counters);
}
