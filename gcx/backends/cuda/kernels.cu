// Gradient Centralization for a list of tensors, alone or inside the step of AdamW or SGD.
//
// One source for torch and CuPy. NVRTC compiles it without headers: one kernel and one rule at a
// time, for one type of ELEMENT, with the options of launcher.py.
//
// Each block takes one tile of one matrix, sums over the fan-in, and applies a rule. The kernels:
//
//   rows           2 to 256 threads hold a row in registers, with one barrier at most
//   long_rows      a block sums a row in segments, then reads it again from the L2 cache
//   columns        a block holds a panel of columns whose fan-in fits in one tile
//   column_sums    sums of the tiles of larger panels, for
//   split_columns  the second launch for these panels, which applies the rule
//   flat           no mean: tensors in an optimizer's step that are not centralized
//
// Sums are in the canonical order of _canonical.py: a halving tree, x[:p/2] + x[p/2:]. The highest
// bit of an element's number is summed first, and the lowest last. The bits are distributed like
// this, from the highest to the lowest:
//
//   16 bytes at a time  [pack k of the thread] [high lanes] [warp] [low lanes] [element v of a pack]
//   one at a time       [pack k] [v]                        [warp] [lanes]
//
// Each part of the tree is computed where its bits are: k inside a thread, lanes by shuffles, warps
// through shared memory.

#ifndef ON_CPU  // tests replace these
#define DEVICE __device__ __forceinline__
#define SHARED(type, name, size) __shared__ type name[size]
#define OPAQUE(word) asm volatile("" : "+r"(word))
#define CONVERTED(text, letter, type, ...)              \
  {                                                     \
    type result;                                        \
    asm(text : "=" letter(result) : __VA_ARGS__);       \
    return result;                                      \
  }
DEVICE float half_to_float(unsigned short x) CONVERTED("cvt.f32.f16 %0, %1;", "f", float, "h"(x))
DEVICE unsigned halves(float low, float high)
    CONVERTED("cvt.rn.f16x2.f32 %0, %1, %2;", "r", unsigned, "f"(high), "f"(low))
DEVICE unsigned bfloats(float low, float high)
    CONVERTED("cvt.rn.bf16x2.f32 %0, %1, %2;", "r", unsigned, "f"(high), "f"(low))
#endif

#define FROM(n, first, count) _Pragma("unroll") for (int n = first; n < count; n++)
#define EACH(n, count) FROM(n, 0, count)

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

typedef ELEMENT E;
template <typename> struct Sums { typedef float Type; };
template <> struct Sums<double> { typedef double Type; };
typedef Sums<E>::Type Wide;  // of sums and of arithmetic

constexpr int V = 16 / sizeof(E);  // elements of a pack
constexpr int WARP = 32;
constexpr int SEGMENT = 16384;  // of the canonical order

// ---- parameters, by value: new addresses and shapes need no copy to the device --------------------

struct alignas(16) Matrix {
  int units, fan_in;
  int step;    // rows: from one unit to the next; columns: from one element of the fan-in to the next
  int shares;  // rows: threads that share a row; columns: tiles that share a segment of a panel
};

// tables.py has the same structure.
template <typename Rule> struct Work {
  Matrix matrix[MATRICES];
  void* arrays[Rule::ROLES][MATRICES];
  int first_tile[MATRICES];
  typename Rule::Number strength, rate, numbers[7];
  void* partials;  // sums of the tiles of split columns
  int matrices;
};

// ---- packs: 16 bytes as they are in memory; all indices are constant after unrolling -------------

struct alignas(16) Pack { unsigned words[4]; };

// Makes the compiler hold these 16 bytes, and not the V wider numbers that were summed.
DEVICE void keep_raw(Pack& pack) {
  EACH(w, 4) OPAQUE(pack.words[w]);
}

DEVICE float widened(const Pack& p, int v, float) { return __uint_as_float(p.words[v]); }
DEVICE double widened(const Pack& p, int v, double) {
  return __hiloint2double(p.words[2 * v + 1], p.words[2 * v]);
}
DEVICE float widened(const Pack& p, int v, Half) {
  return half_to_float(p.words[v / 2] >> v % 2 * 16);
}
DEVICE float widened(const Pack& p, int v, BFloat16) {
  return __uint_as_float(v % 2 ? p.words[v / 2] & 0xffff0000u : p.words[v / 2] << 16);
}
DEVICE Wide wide(const Pack& p, int v) { return widened(p, v, E()); }

DEVICE unsigned word(const float (&x)[V], int w, float) { return __float_as_uint(x[w % V]); }
DEVICE unsigned word(const double (&x)[V], int w, double) {
  return w % 2 ? __double2hiint(x[w / 2]) : __double2loint(x[w / 2]);
}
DEVICE unsigned word(const float (&x)[V], int w, Half) {
  return halves(x[2 * w % V], x[2 * w % V + 1]);
}
DEVICE unsigned word(const float (&x)[V], int w, BFloat16) {
  return bfloats(x[2 * w % V], x[2 * w % V + 1]);
}
DEVICE Pack narrowed(const Wide (&x)[V]) {
  Pack p;
  EACH(w, 4) p.words[w] = word(x, w, E());
  return p;
}

// -0.0 changes no sum, not even a sum of zeros.
DEVICE Pack padding() {
  constexpr unsigned low = sizeof(E) == 2 ? 0x80008000u : sizeof(E) == 4 ? 0x80000000u : 0u;
  constexpr unsigned high = sizeof(E) == 8 ? 0x80000000u : low;
  return Pack{{low, high, low, high}};
}

// Reads or writes element v of a pack alone.
constexpr int WORDS = sizeof(E) / 4;  // of an element; 0 if two share a word
DEVICE void put(Pack& p, int v, const E* from) {
  EACH(w, WORDS) p.words[v * WORDS + w] = reinterpret_cast<const unsigned*>(from)[w];
  if (WORDS) return;
  const unsigned bits = *reinterpret_cast<const unsigned short*>(from), word = p.words[v / 2];
  p.words[v / 2] = v % 2 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
}
DEVICE void take(const Pack& p, int v, E* to) {
  EACH(w, WORDS) reinterpret_cast<unsigned*>(to)[w] = p.words[v * WORDS + w];
  if (!WORDS) *reinterpret_cast<unsigned short*>(to) = p.words[v / 2] >> v % 2 * 16;
}

// ---- walks: the elements of a thread; `at` is the distance from the thread's first element -------

struct RowWalk {
  int left;        // elements of the row, from the thread's first element on
  int step, next;  // from one pack of the thread to the next; from one element of a pack to the next
  bool packed;     // packs are moved whole
  DEVICE RowWalk(int left, int threads, bool packed)
      : left(left), step(threads * V), next(packed ? 1 : threads), packed(packed) {}
  DEVICE long long at(int k, int v) const { return k * step + v * next; }
  DEVICE bool has(int k, int v) const { return k * step + v * next < left; }
};

struct ColumnWalk {
  int rows, columns;  // left, from the thread's first element on
  int apart, next;    // from one row of the thread to the next, which is `down` in memory
  long long down;
  bool packed;
  DEVICE long long at(int k, int v) const { return k * down + v * next; }
  DEVICE bool has(int k, int v) const { return k * apart < rows && v * next < columns; }
};

template <int N, typename Walk>
DEVICE void load(Pack (&packs)[N], const E* from, const Walk& walk, int first) {
  EACH(n, N) packs[n] = padding();
  if (walk.packed) {
    EACH(n, N)
      if (walk.has(first + n, 0))
        packs[n] = *reinterpret_cast<const Pack*>(from + walk.at(first + n, 0));
  } else {
    EACH(n, N * V)
      if (walk.has(first + n / V, n % V))
        put(packs[n / V], n % V, from + walk.at(first + n / V, n % V));
  }
}

template <typename Walk> DEVICE void store(const Pack& p, E* to, const Walk& walk, int k) {
  if (walk.packed) {
    if (walk.has(k, 0)) *reinterpret_cast<Pack*>(to + walk.at(k, 0)) = p;
  } else {
    EACH(v, V)
      if (walk.has(k, v)) take(p, v, to + walk.at(k, v));
  }
}

// ---- rules -----------------------------------------------------------------------------------------
// Role 0 is the gradient. `apply` gets the centralized gradient, and the elements of the other roles
// in x. Roles below READ are read; roles from 1 to LAST are written. With RATE, the mean is over
// grad + rate * weight. A rule that HOLDs keeps the gradients in registers; the others read them again
// from a cache. BLOCKS should fit on a multiprocessor.
// The numbers of a rule are in its own type, so that it reads them from the constant bank as they are.

// Rounded twice, so that a library without fused operations finds the same bits.
DEVICE Wide coupled(Wide grad, Wide weight, Wide rate) { return grad + rate * weight; }

template <bool HAS_RATE> struct StoreRule {  // roles: grad, out, and weight if there is a rate
  static constexpr int ROLES = 2 + HAS_RATE, WEIGHT = 2, READ = 1, LAST = 1;
  static constexpr int BLOCKS = HAS_RATE ? (sizeof(E) > 2 ? 3 : 2) : 4;
  static constexpr bool HOLD = !HAS_RATE, RATE = HAS_RATE;
  typedef Wide Number;
  DEVICE static void apply(Wide g, Wide (&x)[4], Number, const Number (&)[7]) { x[1] = g; }
};
typedef StoreRule<false> Store;
typedef StoreRule<true> StoreRate;

// The fused AdamW of torch 2.11 and later, in its order of operations.
// Roles: grad, weight, exp_avg, exp_avg_sq. Numbers: sign, lr * weight_decay, beta1, beta2,
// step_size, sqrt(bias_correction2), eps.
struct AdamW {
  static constexpr int ROLES = 4, WEIGHT = 1, READ = 4, LAST = 3, BLOCKS = 3;
  static constexpr bool HOLD = false, RATE = false;
  typedef Wide Number;
  DEVICE static void apply(Wide g, Wide (&x)[4], Number, const Number (&n)[7]) {
    g = n[0] * g;
    const Wide square = g * g;
    x[1] = fma(-n[1], x[1], x[1]);
    x[2] = fma(n[2], x[2], fma(-n[2], g, g));
    x[3] = fma(n[3], x[3], fma(-n[3], square, square));
    x[1] = x[1] - n[4] * x[2] / (sqrt(x[3]) / n[5] + n[6]);
  }
};

// Torch's fused SGD, which computes in float64 and rounds each result once. Weight decay is the
// rate; it is added after the mean, as torch adds it to a gradient that is centralized already.
// Roles: grad, weight, and buffer if there is momentum. Numbers: sign, -lr, momentum, 1 - dampening,
// 1 in the first step, 1 for Nesterov momentum.
template <bool HAS_RATE, bool HAS_MOMENTUM> struct SgdRule {
  static constexpr int ROLES = 2 + HAS_MOMENTUM, WEIGHT = 1, READ = ROLES, LAST = ROLES - 1;
  static constexpr int BLOCKS = HAS_RATE && sizeof(E) == 2 ? 2 : 3;
  static constexpr bool HOLD = false, RATE = HAS_RATE;
  typedef double Number;
  DEVICE static void apply(Wide g, Wide (&x)[4], Number rate, const Number (&n)[7]) {
    if (HAS_RATE) g = fma(rate, double(x[1]), double(g));
    g = n[0] * g;
    if (HAS_MOMENTUM) {
      const double buffer = n[4] != 0 ? double(g) : fma(n[2], double(x[2]), n[3] * g);
      x[2] = buffer;
      g = n[5] != 0 ? fma(n[2], buffer, double(g)) : buffer;
    }
    x[1] = fma(n[1], double(g), double(x[1]));
  }
};
typedef SgdRule<false, false> Sgd;
typedef SgdRule<true, false> SgdRate;
typedef SgdRule<false, true> SgdMomentum;
typedef SgdRule<true, true> SgdMomentumRate;

// ---- steps shared by all kernels -------------------------------------------------------------------

// The index is the same for all threads of a block: each comparison reads the constant bank once.
template <typename Rule> DEVICE int find_matrix(const Work<Rule>& work, int tile) {
  int low = 0, high = work.matrices;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (work.first_tile[middle] <= tile) low = middle;
    else high = middle;
  }
  return low;
}

// True if packs can be moved whole: in all arrays of a matrix, given the step and the size in it.
template <typename Rule>
DEVICE bool is_packed(const Work<Rule>& work, int m, int sizes) {
  size_t all = 0;
  EACH(r, Rule::ROLES) all |= reinterpret_cast<size_t>(work.arrays[r][m]);
  return all % 16 == 0 && sizes % V == 0;
}

template <typename Rule> struct Arrays {  // where the thread starts in each of them
  E* at[4];
  DEVICE Arrays(const Work<Rule>& work, int m, long long offset) {
    EACH(r, Rule::ROLES) at[r] = static_cast<E*>(work.arrays[r][m]) + offset;
  }
};

// The halving tree over N numbers, of which these are k, k + STEP, k + 2 STEP ...
template <int N, int STEP = 1, typename Number> DEVICE Wide tree(const Number& number, int k = 0) {
  if constexpr (STEP < N)
    return tree<N, 2 * STEP>(number, k) + tree<N, 2 * STEP>(number, k + STEP);
  else
    return number(k);
}

// Adds the weights to a pack of gradients, so that no registers hold both.
template <typename Rule, typename Walk>
DEVICE void couple(Pack& held, const Arrays<Rule>& arrays, const Walk& walk, int k, Wide rate) {
  Pack weights[1];
  load(weights, arrays.at[Rule::WEIGHT], walk, k);
  Wide x[V];
  EACH(v, V) {
    const Wide g = wide(held, v);
    x[v] = walk.has(k, v) ? coupled(g, wide(weights[0], v), rate) : g;
  }
  keep_raw(held = narrowed(x));
}

// Sums over the packs of a thread. With a rate, weights are read here, and again by `apply`, and the
// gradients in registers are lost.
template <typename Rule, int K, typename Walk>
DEVICE void sum_packs(Wide (&sums)[V], Pack (&held)[K], const Arrays<Rule>& arrays,
                      const Walk& walk, Wide rate) {
  constexpr bool FITS = sizeof(E) == sizeof(Wide);  // a sum of a gradient and a weight, in a pack
  Pack weights[K];
  if (Rule::RATE && FITS) EACH(k, K) couple(held[k], arrays, walk, k, rate);
  if (Rule::RATE && !FITS) load(weights, arrays.at[Rule::WEIGHT], walk, 0);
  EACH(v, V) {
    sums[v] = tree<K>([&](int k) {
      const Wide g = wide(held[k], v);
      if (!Rule::RATE || FITS || !walk.has(k, v)) return g;
      return coupled(g, wide(weights[k], v), rate);
    });
  }
}

// Applies the rule to all packs of a thread; `means` has one for each element of a pack. Gradients
// come from registers if they are HELD, which needs an unrolled loop, or else from a cache.
template <typename Rule, bool HELD, int K, typename Walk>
DEVICE void apply_to(Pack (&held)[K], const Wide (&means)[V], const Arrays<Rule>& arrays,
                     const Walk& walk, const Work<Rule>& work) {
#pragma unroll(HELD ? K : 1)
  for (int k = 0; k < K; k++) {
    Pack x[4][1];
    if (HELD) keep_raw(x[0][0] = held[k]);
    FROM(r, HELD, Rule::READ) load(x[r], arrays.at[r], walk, k);
    Wide results[4][V];
    EACH(v, V) {
      Wide y[4];
      FROM(r, 1, Rule::READ) y[r] = wide(x[r][0], v);
      Rule::apply(wide(x[0][0], v) - means[v], y, work.rate, work.numbers);
      FROM(r, 1, Rule::LAST + 1) results[r][v] = y[r];
    }
    FROM(r, 1, Rule::LAST + 1) store(narrowed(results[r]), arrays.at[r], walk, k);
  }
}
template <typename Rule, int K, typename Walk>
DEVICE void apply(Pack (&held)[K], const Wide (&means)[V], const Arrays<Rule>& arrays, Walk walk,
                  const Work<Rule>& work) {
  if (Rule::HOLD && walk.packed) {
    walk.packed = true;  // now the compiler knows it
    apply_to<Rule, true>(held, means, arrays, walk, work);
  } else {
    apply_to<Rule, false>(held, means, arrays, walk, work);
  }
}

template <typename Rule> DEVICE Wide scaled_mean(Wide sum, int fan_in, const Work<Rule>& work) {
  return sum / static_cast<Wide>(fan_in) * static_cast<Wide>(work.strength);
}

// ---- sums over threads -----------------------------------------------------------------------------

DEVICE Wide other_lane(Wide x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }

DEVICE Wide sum_lanes(Wide x, int from, int to) {  // over lanes `from`, from / 2 ... `to` apart
#pragma unroll
  for (int half = from; half >= to; half /= 2) x += other_lane(x, half);
  return x;
}

// Sums N numbers at once over lanes HALF, HALF / 2 ... LAST apart. Each lane gives away the half of
// its sums that its partner keeps, so this takes N - 1 shuffles, not N a step. Afterwards sum n is in
// the lanes where HALF has the highest bit of n, HALF / 2 the next bit, and so on.
template <int HALF, int LAST, int N> DEVICE void deal(Wide (&sums)[N]) {
  if constexpr (HALF >= LAST && HALF > 0 && N > 1) {
    const bool upper = threadIdx.x & HALF;
    Wide kept[N / 2];
    EACH(n, N / 2) {
      const Wide given = upper ? sums[n] : sums[n + N / 2];
      kept[n] = (upper ? sums[n + N / 2] : sums[n]) + other_lane(given, HALF);
    }
    deal<HALF / 2, LAST>(kept);
    EACH(n, N / 2) sums[n] = kept[n];
  } else {
    sums[0] = sum_lanes(sums[0], HALF, LAST > 0 ? LAST : 1);
  }
}

// Where a thread starts in a row that `threads` share.
DEVICE int first_in_row(bool packed, int threads) {
  constexpr int LOW = WARP / V;
  const int warp = threadIdx.x % threads / WARP, lane = threadIdx.x % WARP;
  if (!packed) return threadIdx.x % threads;
  if (threads <= WARP) return threadIdx.x % threads * V;
  return (lane / LOW * (threads / WARP) + warp) * WARP + lane % LOW * V;
}

// Sums over the N threads of a row and the elements of a pack, with one barrier if these are more
// than a warp. Then `deal` leaves each lane of a warp one of 32 neighbouring numbers.
template <int N> DEVICE Wide sum_row(Wide (&sums)[V], bool packed, Wide* shared) {
  constexpr int LOW = WARP / V, WARPS = N / WARP, DEALT = N < V ? N : V;
  constexpr int HALF = (N < WARP ? N : WARP) / 2;
  if (!packed) sums[0] = tree<V>([&](int v) { return sums[v]; });
  if constexpr (N <= WARP) {
    if (!packed) return sum_lanes(sums[0], HALF, 1);
    deal<HALF, 1>(sums);
    return tree<V / DEALT>([&](int v) { return sum_lanes(sums[v], HALF, N / DEALT); });
  } else {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (packed) deal<HALF, LOW>(sums);
    shared[warp * WARP + (packed ? lane % LOW * V + lane / LOW : lane)] = sums[0];
    __syncthreads();
    const Wide* mine = shared + warp / WARPS * WARPS * WARP + lane;
    return sum_lanes(tree<WARPS>([&](int w) { return mine[w * WARP]; }), HALF, 1);
  }
}

// ---- kernels: threads of a block, and packs of a thread ---------------------------------------------

template <int T, int K> struct Shape { static constexpr int THREADS = T, PACKS = K; };

#define START(block, sizes)                                                        \
  constexpr int T = Shape::THREADS, K = Shape::PACKS;                              \
  const int m = find_matrix(work, block), tile = (block) - work.first_tile[m];     \
  const Matrix matrix = work.matrix[m];                                            \
  const bool packed = is_packed<Rule>(work, m, sizes);                             \
  Pack held[K];                                                                    \
  Wide means[V];

template <typename Rule> struct rows : Shape<256, 8> {
  static constexpr int BLOCKS = Rule::BLOCKS;
  DEVICE static void run(const Work<Rule>& work) {
    START(blockIdx.x, matrix.step | matrix.fan_in)
    SHARED(Wide, shared, T);
    const int threads = matrix.shares, unit = (tile * T + threadIdx.x) / threads;
    const int first = first_in_row(packed, threads);
    const RowWalk walk((unit < matrix.units ? matrix.fan_in : 0) - first, threads, packed);
    const Arrays<Rule> arrays(work, m, static_cast<long long>(unit) * matrix.step + first);
    load(held, arrays.at[0], walk, 0);
    sum_packs<Rule>(means, held, arrays, walk, work.rate);
    Wide sum;
#define SUM_BY(N) case N: sum = sum_row<N>(means, packed, shared); break;
    switch (threads) {
      SUM_BY(2) SUM_BY(4) SUM_BY(8) SUM_BY(16) SUM_BY(32) SUM_BY(64) SUM_BY(128)
      default: sum = sum_row<T>(means, packed, shared);
    }
    const Wide mean = scaled_mean(sum, matrix.fan_in, work);
    EACH(v, V) means[v] = mean;
    apply(held, means, arrays, walk, work);
  }
};

// Segments use the two halves of `shared` in turn, so one barrier a segment is enough.
template <typename Rule> struct long_rows : Shape<SEGMENT / 8 / V, 8> {  // one segment
  static constexpr int BLOCKS = (Rule::BLOCKS * 256 + THREADS - 1) / THREADS;
  DEVICE static void run(const Work<Rule>& work) {
    START(blockIdx.x, matrix.step | matrix.fan_in)
    SHARED(Wide, shared, 2 * T);
    const int first = first_in_row(packed, T);
    Arrays<Rule> arrays(work, m, static_cast<long long>(tile) * matrix.step + first);
    RowWalk walk(matrix.fan_in - first, T, packed);
    Wide total = -0.0;
    for (int start = 0; start < matrix.fan_in; start += SEGMENT, walk.left -= SEGMENT) {
      load(held, arrays.at[0], walk, 0);
      sum_packs<Rule>(means, held, arrays, walk, work.rate);
      total += sum_row<T>(means, packed, shared + start / SEGMENT % 2 * T);
      EACH(r, Rule::ROLES) arrays.at[r] += SEGMENT;
    }
    const Wide mean = scaled_mean(total, matrix.fan_in, work);
    EACH(v, V) means[v] = mean;
    for (int start = 0; start < matrix.fan_in; start += SEGMENT) {  // newest in the cache first
      walk.left += SEGMENT;
      EACH(r, Rule::ROLES) arrays.at[r] -= SEGMENT;
      apply_to<Rule, false>(held, means, arrays, walk, work);
    }
  }
};

// Neighbours in memory are neighbouring columns; 8 lanes read 128 bytes of a row. A panel is 8 packs
// wide. A tile has every `splits`th row of a segment of a panel, which is one part of its tree.
enum Phase { WHOLE, SUM, APPLY };

template <typename Rule, Phase PHASE> struct ColumnTiles : Shape<256, (V > 4 ? 4 : 8)> {
  static constexpr int BLOCKS = V <= 4 && Rule::BLOCKS > 3 ? 3 : Rule::BLOCKS;
  DEVICE static void run(const Work<Rule>& work) {
    // The tiles that were summed last are the first to be read again, from the L2 cache.
    const int block = PHASE == APPLY ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    START(block, matrix.step | matrix.units)
    constexpr int C = 8 * V, WARPS = T / WARP, STEP = T / 8, PARTS = T / C;
    constexpr int MOST = SEGMENT / (K * STEP) / PARTS;
    constexpr int SIZE = WARPS * C > T ? WARPS * C : T;  // the means follow
    SHARED(Wide, shared, SIZE + C);
    const int segments = (matrix.fan_in + SEGMENT - 1) / SEGMENT, splits = matrix.shares;
    const int tiles = segments * splits, panel = tile / tiles, piece = tile % tiles;
    const int warp = threadIdx.x / WARP, high = threadIdx.x % WARP / 8, low = threadIdx.x % 8;
    const int row = piece / splits * SEGMENT + (high * WARPS + warp) * splits + piece % splits;
    const int column = panel * C + low * (packed ? V : 1);
    const ColumnWalk walk{matrix.fan_in - row, matrix.units - column, STEP * splits,
                          packed ? 1 : 8, static_cast<long long>(STEP * splits) * matrix.step,
                          packed};
    const Arrays<Rule> arrays(work, m, static_cast<long long>(row) * matrix.step + column);
    Wide* partials = static_cast<Wide*>(work.partials) +
                     static_cast<long long>(work.first_tile[m] + panel * tiles) * C;
    const int c = threadIdx.x % C, part = threadIdx.x / C;  // of the sums of the panel
    Wide total = -0.0;
    if (PHASE != APPLY || Rule::HOLD) load(held, arrays.at[0], walk, 0);
    if (PHASE != APPLY) {
      sum_packs<Rule>(means, held, arrays, walk, work.rate);
      deal<16, 8>(means);
      EACH(i, (V + 3) / 4) {
        const int v = high * V / 4 + i;
        shared[warp * C + (packed ? low * V + v : v * 8 + low)] = means[i];
      }
      __syncthreads();
      total = tree<WARPS>([&](int w) { return shared[w * C + c]; });
    }
    if (PHASE == SUM) {
      if (part == 0) partials[piece * C + c] = total;
      return;
    }
    if (PHASE == APPLY) {
      for (int segment = 0; segment < tiles; segment += splits) {
        if (segment) __syncthreads();
        shared[part * C + c] = tree<MOST>([&](int n) {
          const int split = n * PARTS + part;
          return split < splits ? partials[(segment + split) * C + c] : Wide(-0.0);
        });
        __syncthreads();
        total += tree<PARTS>([&](int n) { return shared[n * C + c]; });
      }
    }
    if (part == 0) shared[SIZE + c] = scaled_mean(total, matrix.fan_in, work);
    __syncthreads();
    EACH(v, V) means[v] = shared[SIZE + (packed ? low * V + v : v * 8 + low)];
    apply(held, means, arrays, walk, work);
  }
};
template <typename Rule> struct columns : ColumnTiles<Rule, WHOLE> {};
template <typename Rule> struct column_sums : ColumnTiles<Rule, SUM> {};
template <typename Rule> struct split_columns : ColumnTiles<Rule, APPLY> {};

template <typename Rule> struct flat : Shape<256, 4> {  // a tensor is one row
  static constexpr int BLOCKS = Rule::BLOCKS;
  DEVICE static void run(const Work<Rule>& work) {
    START(blockIdx.x, matrix.fan_in)
    const int first = tile * (T * K * V) + threadIdx.x * (packed ? V : 1);
    const RowWalk walk(matrix.fan_in - first, T, packed);
    const Arrays<Rule> arrays(work, m, first);
    EACH(v, V) means[v] = 0;
    apply_to<Rule, false>(held, means, arrays, walk, work);
  }
};

#ifdef KERNEL
extern "C" __global__ void __launch_bounds__(KERNEL<RULE>::THREADS, KERNEL<RULE>::BLOCKS)
    gcx_kernel(const __grid_constant__ Work<RULE> work) {
  KERNEL<RULE>::run(work);
}
#endif
