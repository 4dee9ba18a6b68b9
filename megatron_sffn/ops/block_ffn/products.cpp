// The three products of a sparse feed-forward layer on a CPU, and the sort of pairs by block.
//
// Pairs of rows and blocks are sorted by block: those of block i are offsets[i] to offsets[i + 1],
// with ascending rows. `table` is [B, N, D], `pairs` is [P, N], `rows` is [R, D], `row` is [P]. For
// a pair p of block i:
//
//   to_pairs (SDD)    pairs[p]      = rows[row[p]] table[i]^T
//   to_rows  (DSD)    rows[row[p]] += pairs[p] table[i]
//   to_table (DS^TD)  table[i]      = sum over p of pairs[p]^T rows[row[p]]
//
// Design notes:
// - One register tile serves all three products. It reads and writes through functions, so rows are
//   used in place, and no gathered copy of them exists.
// - One thread sums each number, in a fixed order: results do not depend on the number of threads.
// - Blocks of a few cells do not fill a tile. For them to_pairs computes dot products, and to_rows
//   goes row by row over a part of the table that fits in the L2 cache.
// - Vectors are ATen's `Vectorized`. Only the number of registers depends on the instruction set.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Numbers in a vector register.
template <typename T>
constexpr int kLanes = Vectorized<T>::size();

// Vectors per row of the widest tile, and rows of a tile that is V vectors wide. The tile's sums,
// one row of its right operand and one broadcast number of its left operand fill the registers:
// with AVX-512 6·4 + 4 + 1 of 32, else 6·2 + 2 + 1 of 16.
constexpr int kWidest = kRegisters / 8;
template <int V>
constexpr int kHeight = V == kWidest ? 6 : 8;

// Terms that a tile sums before the next tile begins: its right operand, kDepth rows of at most
// kWidest vectors (64 KiB with AVX-512), stays in the cache for all tiles below it.
constexpr int64_t kDepth = 256;
// Pairs of a block that are one work item in to_pairs.
constexpr int64_t kPairs = 512;
// Rows and columns of y that are one work item in to_rows. In fp32 these 2 MiB exceed an L2 cache
// of 1 MiB, but larger items make fewer passes over the table, which counts for more
// (benchmarks/NOTES.md).
constexpr int64_t kRows = 2048;
constexpr int64_t kColumns = 256;
// Cells whose gradient is one work item in to_table.
constexpr int64_t kCells = 96;
// Coefficients of consecutive pairs are N numbers apart. From this distance on they map to few sets
// of the L1 cache and evict each other, so they are first copied to a dense buffer.
constexpr int64_t kFarApart = 512;
// Multiplications that justify another thread: 10 microseconds or more.
constexpr int64_t kWork = 1 << 19;
// Sizes of work items for blocks of few cells: rows in to_pairs, and in to_rows vectors per row and
// cells of a part of the table. These rows, or this part of the table, stay in the L2 cache.
constexpr int64_t kDotRows = 256;
constexpr int64_t kBagVectors = 8;
constexpr int64_t kBagCells = 1024;

// Blocks of fewer cells than a vector has lanes leave too much of a tile empty.
template <typename T>
constexpr int64_t kFewCells = kLanes<T>;
// Up to this many cells per block, reading and writing a row of y for each block costs more than
// sorting the coefficients by row.
constexpr int64_t kBagBlock = 2;

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f(item) for all items in parallel. A thread that has finished takes the next item, because
// blocks differ in their numbers of pairs. Which thread computes an item does not change its sums.
// `work`, in multiplications, limits the number of threads.
template <typename F>
void parallel(int64_t items, int64_t work, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::clamp<int64_t>(work / kWork, 1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next++) < items;) f(item);
  });
}

// A tile of M rows and V vectors: c(m) = sum over k of a(m, k) * b(k), plus c(m) if `add`. `a`
// returns a number, `b` and `c` return the address of a row. With kPart a row has `width` numbers,
// less than one vector. M and V are compile-time constants and all loops over them are unrolled, so
// that the sums stay in registers.
template <typename T, int M, int V, bool kPart, typename A, typename B, typename C>
C10_ALWAYS_INLINE void tile(int64_t depth, const A& a, const B& b, const C& c, bool add,
                            int width) {
  using Vec = Vectorized<T>;
  constexpr int L = kLanes<T>;
  Vec sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sums[m][v] = !add ? Vec(T(0)) : kPart ? Vec::loadu(c(m), width) : Vec::loadu(c(m) + v * L);
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = b(k);
    Vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = kPart ? Vec::loadu(row, width) : Vec::loadu(row + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec left(a(m, k));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = at::vec::fmadd(left, right[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (kPart) {
        sums[m][v].store(c(m), width);
      } else {
        sums[m][v].store(c(m) + v * L);
      }
    }
}

// `height` rows as a column of tiles of nearly equal height. A short last tile has too few
// independent sums to hide the latency of the multiply-adds: equal heights took 1.14 instead
// of 1.30 of a dense product (benchmarks/NOTES.md).
template <typename T, int V, bool kPart, typename A, typename B, typename C>
void tiles(int64_t height, int64_t depth, const A& a, const B& b, const C& c, bool add, int width) {
  constexpr int M = kHeight<V>;
  const int64_t count = (height + M - 1) / M;
  // Calls the instance of `tile` with as many rows: the || stops at the first that matches.
  const auto run = [&]<int... H>(int64_t at, int rows, std::integer_sequence<int, H...>) {
    const auto left = [&](int m, int64_t k) { return a(at + m, k); };
    const auto sums = [&](int m) { return c(at + m); };
    (void)((rows == H + 1 && (tile<T, H + 1, V, kPart>(depth, left, b, sums, add, width), true)) ||
           ...);
  };
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = height * t / count;
    run(at, static_cast<int>(height * (t + 1) / count - at), std::make_integer_sequence<int, M>());
  }
}

// Cuts `columns` into strips of V vectors, then V / 2 and so on down to 1, and a rest that is less
// than a vector: f(Int<vectors>, std::bool_constant<less than a vector>, first column, columns).
template <typename T, int V, typename F>
void strips(int64_t columns, const F& f, int64_t at = 0) {
  constexpr int wide = V * kLanes<T>;
  for (; at + wide <= columns; at += wide) f(Int<V>(), std::false_type(), at, wide);
  if constexpr (V > 1) {
    strips<T, V / 2>(columns, f, at);
  } else if (at < columns) {
    f(Int<1>(), std::true_type(), at, static_cast<int>(columns - at));
  }
}

// The indices and sizes of a call.
template <typename T>
struct Job {
  const int* row;
  const int64_t* offsets;
  int64_t num_rows, blocks, cells, width;

  // Multiplications in the call.
  int64_t work() const { return offsets[blocks] * cells * width; }

  // The pairs of a block whose rows are in [first, last): a binary search, because rows ascend.
  std::pair<int64_t, int64_t> span(int64_t block, int64_t first, int64_t last) const {
    const int* end = row + offsets[block + 1];
    const int* from = std::lower_bound(row + offsets[block], end, first);
    return {from - row, std::lower_bound(from, end, last) - row};
  }
};

// Transposes a [width, depth] part of a table, whose rows are `stride` apart, to [depth, width]. It
// goes by squares of S x S, so that the lines of cache that it reads and writes are used up.
template <typename T>
void transpose(const T* from, int64_t stride, int64_t depth, int width, T* to) {
  constexpr int64_t S = 16;
  for (int64_t k = 0; k < depth; k += S)
    for (int64_t n = 0; n < width; n += S) {
      const int64_t k_end = std::min(k + S, depth), n_end = std::min<int64_t>(n + S, width);
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<T, float>) {
        if (k_end - k == S && n_end - n == S) {
          at::vec::transpose_mxn<float, S, S>(from + n * stride + k, stride, to + k * width + n,
                                              width);
          continue;
        }
      }
#endif
      for (int64_t i = n; i < n_end; ++i)
        for (int64_t j = k; j < k_end; ++j) to[j * width + i] = from[i * stride + j];
    }
}

// Work items are up to kPairs pairs of one block. Each transposes the block's cells, part by part,
// so that a tile reads consecutive cells as vectors; kPairs rows amortise the transposition.
template <typename T>
void to_pairs_by_tiles(const Job<T>& job, const T* rows, const T* table, T* pairs) {
  struct Item {
    int64_t block, from, to;
  };
  std::vector<Item> items;
  for (int64_t i = 0; i < job.blocks; ++i)
    for (int64_t at = job.offsets[i]; at < job.offsets[i + 1]; at += kPairs)
      items.push_back({i, at, std::min(at + kPairs, job.offsets[i + 1])});
  parallel(items.size(), job.work(), [&](int64_t index) {
    const auto [block, from, to] = items[index];
    const T* cells = table + block * job.cells * job.width;
    std::vector<const T*> left(to - from);
    std::vector<T> right(std::min(kDepth, job.width) * kWidest * kLanes<T>);
    strips<T, kWidest>(job.cells, [&](auto vectors, auto part, int64_t n, int width) {
      for (int64_t k = 0; k < job.width; k += kDepth) {
        const int64_t depth = std::min(kDepth, job.width - k);
        transpose(cells + n * job.width + k, job.width, depth, width, right.data());
        for (int64_t p = from; p < to; ++p) left[p - from] = rows + job.row[p] * job.width + k;
        tiles<T, vectors(), part()>(
            to - from, depth, [&](int64_t m, int64_t i) { return left[m][i]; },
            [&](int64_t i) { return right.data() + i * width; },
            [&](int64_t m) { return pairs + (from + m) * job.cells + n; }, k > 0, width);
      }
    });
  });
}

// M rows times N cells, each a dot product whose lanes are added at the end. Rows and cells are
// read in place: with so few cells a transposition would cost as much as the product.
template <typename T, int M, int N>
C10_ALWAYS_INLINE void dots(const T* const* rows, const T* cells, int64_t width, T* to,
                            int64_t stride) {
  using Vec = Vectorized<T>;
  Vec sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = Vec(T(0));
  const auto step = [&](int64_t k, int count) {
    Vec right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = Vec::loadu(cells + n * width + k, count);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec left = Vec::loadu(rows[m] + k, count);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = at::vec::fmadd(left, right[n], sums[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes<T> <= width; k += kLanes<T>) step(k, kLanes<T>);
  if (k < width) step(k, static_cast<int>(width - k));
  const auto plus = [](const Vec& x, const Vec& y) { return x + y; };
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) to[m * stride + n] = at::vec::vec_reduce_all<T>(plus, sums[m][n]);
}

// Work items are kDotRows rows and a part of the blocks: the rows stay in the L2 cache while the
// blocks pass by. All items of the same rows come one after the other.
template <typename T>
void to_pairs_by_dots(const Job<T>& job, const T* rows, const T* table, T* pairs) {
  const int64_t tiles = (job.num_rows + kDotRows - 1) / kDotRows,
                parts = std::min<int64_t>(16, job.blocks);
  parallel(tiles * parts, job.work(), [&](int64_t index) {
    const int64_t first = index / parts * kDotRows, part = index % parts;
    for (int64_t i = job.blocks * part / parts; i < job.blocks * (part + 1) / parts; ++i) {
      const auto [from, to] = job.span(i, first, first + kDotRows);
      const T* cells = table + i * job.cells * job.width;
      const T* left[4];
      const auto multiply_rows = [&](auto height, int64_t p) {
        for (int m = 0; m < height(); ++m) left[m] = rows + job.row[p + m] * job.width;
        const auto multiply_cells = [&](auto count, int64_t n) {
          dots<T, height(), count()>(left, cells + n * job.width, job.width,
                                     pairs + p * job.cells + n, job.cells);
        };
        int64_t n = 0;
        for (; n + 4 <= job.cells; n += 4) multiply_cells(Int<4>(), n);
        for (; n < job.cells; ++n) multiply_cells(Int<1>(), n);
      };
      int64_t p = from;
      for (; p + 4 <= to; p += 4) multiply_rows(Int<4>(), p);
      for (; p < to; ++p) multiply_rows(Int<1>(), p);
    }
  });
}

// Work items are kRows x kColumns of y. A row of y collects its blocks in ascending order, in
// whatever order the items run.
template <typename T>
void to_rows_by_tiles(const Job<T>& job, const T* pairs, const T* table, T* rows) {
  const int64_t tall = (job.num_rows + kRows - 1) / kRows,
                wide = (job.width + kColumns - 1) / kColumns;
  parallel(tall * wide, job.work(), [&](int64_t index) {
    const int64_t first = index / wide * kRows, last = std::min(first + kRows, job.num_rows);
    const int64_t column = index % wide * kColumns,
                  columns = std::min(kColumns, job.width - column);
    for (int64_t r = first; r < last; ++r)
      std::fill_n(rows + r * job.width + column, columns, T(0));
    std::vector<T*> sums;
    for (int64_t i = 0; i < job.blocks; ++i) {
      const auto [from, to] = job.span(i, first, last);
      sums.resize(to - from);
      for (int64_t p = from; p < to; ++p) sums[p - from] = rows + job.row[p] * job.width + column;
      for (int64_t k = 0; k < job.cells && from < to; k += kDepth) {
        const T* cells = table + (i * job.cells + k) * job.width + column;
        strips<T, kWidest>(columns, [&](auto vectors, auto part, int64_t n, int width) {
          tiles<T, vectors(), part()>(
              to - from, std::min(kDepth, job.cells - k),
              [&](int64_t m, int64_t j) { return pairs[(from + m) * job.cells + k + j]; },
              [&](int64_t j) { return cells + j * job.width + n; },
              [&](int64_t m) { return sums[m] + n; }, true, width);
        });
      }
    }
  });
}

// row += sum over j of h[j] * table[cell[j]], for rows of V vectors, or with kPart of less than
// one.
template <typename T, int V, bool kPart>
void bag(const T* table, const int* cell, const T* h, int64_t count, T* row, int width) {
  using Vec = Vectorized<T>;
  constexpr int L = kLanes<T>;
  Vec sums[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sums[v] = kPart ? Vec::loadu(row, width) : Vec::loadu(row + v * L);
  for (int64_t j = 0; j < count; ++j) {
    const T* right = table + cell[j] * (V * L);
    const Vec left(h[j]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[v] = at::vec::fmadd(left, Vec::loadu(right + v * L), sums[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (kPart) {
      sums[v].store(row, width);
    } else {
      sums[v].store(row + v * L);
    }
  }
}

// Like embedding_bag: each row sums its own cells. The first loop sorts the coefficients of each
// part of the table by row (a counting sort); the second sums them, part by part, from a copy of a
// few columns of the part that stays in the L2 cache.
template <typename T>
void to_rows_by_bags(const Job<T>& job, const T* pairs, const T* table, T* rows) {
  // A part of the table is `blocks` consecutive blocks.
  const int64_t blocks = kBagCells / job.cells, parts = (job.blocks + blocks - 1) / blocks;
  const int64_t size = job.offsets[job.blocks] * job.cells;
  std::vector<int64_t> starts(parts * job.num_rows + 1, size);
  const auto cell = std::make_unique_for_overwrite<int[]>(size);
  const auto h = std::make_unique_for_overwrite<T[]>(size);
  parallel(parts, job.work(), [&](int64_t part) {
    const int64_t first = part * blocks, last = std::min(first + blocks, job.blocks);
    // First the number of coefficients of each row, then the place of the row's next one.
    std::vector<int64_t> next(job.num_rows);
    for (int64_t p = job.offsets[first]; p < job.offsets[last]; ++p) next[job.row[p]] += job.cells;
    int64_t sum = job.offsets[first] * job.cells;
    for (int64_t r = 0; r < job.num_rows; ++r) {
      starts[part * job.num_rows + r] = sum;
      sum += std::exchange(next[r], sum);
    }
    for (int64_t i = first; i < last; ++i)
      for (int64_t p = job.offsets[i]; p < job.offsets[i + 1]; ++p)
        for (int64_t c = 0; c < job.cells; ++c) {
          const int64_t at = next[job.row[p]]++;
          cell[at] = static_cast<int>((i - first) * job.cells + c);
          h[at] = pairs[p * job.cells + c];
        }
  });
  const int64_t tall = std::max(kRows, (job.num_rows - 1) / at::get_num_threads() + 1);
  parallel((job.num_rows + tall - 1) / tall, job.work(), [&](int64_t index) {
    const int64_t first = index * tall, last = std::min(first + tall, job.num_rows);
    std::fill(rows + first * job.width, rows + last * job.width, T(0));
    std::vector<T> cached(kBagCells * kBagVectors * kLanes<T>);
    strips<T, kBagVectors>(job.width, [&](auto vectors, auto partial, int64_t n, int width) {
      const int64_t stride = vectors() * kLanes<T>;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t c = part * blocks * job.cells;
        const int64_t count = std::min(blocks * job.cells, job.blocks * job.cells - c);
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(table + (c + i) * job.width + n, width, cached.data() + i * stride);
        for (int64_t r = first; r < last; ++r) {
          const int64_t from = starts[part * job.num_rows + r],
                        to = starts[part * job.num_rows + r + 1];
          bag<T, vectors(), partial()>(cached.data(), cell.get() + from, h.get() + from, to - from,
                                       rows + r * job.width + n, width);
        }
      }
    });
  });
}

template <typename T>
void to_table(const Job<T>& job, const T* pairs, const T* rows, T* table) {
  // Work items are kColumns columns of a few whole blocks, or of kCells cells of one block. Items
  // of the same columns come one after the other, so that these columns of the rows stay in the
  // cache.
  const int64_t wide = (job.width + kColumns - 1) / kColumns;
  const int64_t blocks = std::max<int64_t>(1, kCells / job.cells),
                groups = (job.blocks + blocks - 1) / blocks;
  const int64_t parts = (job.cells + kCells - 1) / kCells;
  parallel(wide * groups * parts, job.work(), [&](int64_t index) {
    const int64_t column = index / (groups * parts) * kColumns,
                  columns = std::min(kColumns, job.width - column);
    const int64_t group = index / parts % groups, cell = index % parts * kCells;
    const int64_t height = std::min(kCells, job.cells - cell);
    std::vector<const T*> right;
    std::vector<T> dense;
    for (int64_t i = group * blocks; i < std::min((group + 1) * blocks, job.blocks); ++i) {
      const int64_t from = job.offsets[i], count = job.offsets[i + 1] - from;
      T* sums = table + (i * job.cells + cell) * job.width + column;
      right.resize(count);
      for (int64_t p = 0; p < count; ++p) right[p] = rows + job.row[from + p] * job.width + column;
      const T* left = pairs + from * job.cells + cell;
      int64_t stride = job.cells;
      if (stride >= kFarApart) {
        dense.resize(count * height);
        for (int64_t p = 0; p < count; ++p)
          std::copy_n(left + p * stride, height, dense.data() + p * height);
        left = dense.data();
        stride = height;
      }
      strips<T, kWidest>(columns, [&](auto vectors, auto part, int64_t n, int width) {
        int64_t k = 0;
        do {  // runs once for an empty block, and so writes its zero gradient
          tiles<T, vectors(), part()>(
              height, std::min(kDepth, count - k),
              [&](int64_t m, int64_t p) { return left[(k + p) * stride + m]; },
              [&](int64_t p) { return right[k + p] + n; },
              [&](int64_t m) { return sums + m * job.width + n; }, k > 0, width);
          k += kDepth;
        } while (k < count);
      });
    }
  });
}

template <typename T>
Job<T> make(const Tensor& row, const Tensor& offsets, int64_t num_rows, int64_t cells,
            int64_t width) {
  TORCH_CHECK(row.is_contiguous() && offsets.is_contiguous(), "indices must be contiguous");
  return {row.const_data_ptr<int>(),
          offsets.const_data_ptr<int64_t>(),
          num_rows,
          offsets.size(0) - 1,
          cells,
          width};
}

Tensor to_pairs_op(const Tensor& rows, const Tensor& table, const Tensor& row,
                   const Tensor& offsets) {
  Tensor pairs = at::empty({row.size(0), table.size(1)}, rows.options());
  TORCH_CHECK(rows.is_contiguous() && table.is_contiguous(), "rows and table must be contiguous");
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "to_pairs", [&] {
    const auto job = make<scalar_t>(row, offsets, rows.size(0), table.size(1), table.size(2));
    const auto by =
        job.cells < kFewCells<scalar_t> ? to_pairs_by_dots<scalar_t> : to_pairs_by_tiles<scalar_t>;
    by(job, rows.const_data_ptr<scalar_t>(), table.const_data_ptr<scalar_t>(),
       pairs.mutable_data_ptr<scalar_t>());
  });
  return pairs;
}

Tensor to_rows_op(const Tensor& pairs, const Tensor& table, const Tensor& row,
                  const Tensor& offsets, int64_t num_rows) {
  Tensor rows = at::empty({num_rows, table.size(2)}, pairs.options());
  TORCH_CHECK(pairs.is_contiguous() && table.is_contiguous(), "pairs and table must be contiguous");
  AT_DISPATCH_FLOATING_TYPES(pairs.scalar_type(), "to_rows", [&] {
    const auto job = make<scalar_t>(row, offsets, num_rows, table.size(1), table.size(2));
    const auto by = job.cells <= kBagBlock ? to_rows_by_bags<scalar_t> : to_rows_by_tiles<scalar_t>;
    by(job, pairs.const_data_ptr<scalar_t>(), table.const_data_ptr<scalar_t>(),
       rows.mutable_data_ptr<scalar_t>());
  });
  return rows;
}

Tensor to_table_op(const Tensor& pairs, const Tensor& rows, const Tensor& row,
                   const Tensor& offsets) {
  Tensor table = at::empty({offsets.size(0) - 1, pairs.size(1), rows.size(1)}, rows.options());
  TORCH_CHECK(pairs.is_contiguous() && rows.is_contiguous(), "pairs and rows must be contiguous");
  AT_DISPATCH_FLOATING_TYPES(pairs.scalar_type(), "to_table", [&] {
    const auto job = make<scalar_t>(row, offsets, rows.size(0), pairs.size(1), rows.size(1));
    to_table<scalar_t>(job, pairs.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                       table.mutable_data_ptr<scalar_t>());
  });
  return table;
}

// Stable counting sort of [P] int32 block ids: the order [P] int32 and the offsets [B + 1] int64.
// Each thread counts a part of the ids, and `next` then tells where its ids of each block go. Parts
// are in the order of the pairs, so the sort is stable and does not depend on the threads.
std::tuple<Tensor, Tensor> sort_op(const Tensor& ids, int64_t blocks) {
  const Tensor block = ids.contiguous();
  const int64_t size = block.size(0), parts = at::get_num_threads();
  Tensor order = at::empty({size}, block.options());
  Tensor offsets = at::empty({blocks + 1}, block.options().dtype(at::kLong));
  const int* id = block.const_data_ptr<int>();
  int* to = order.mutable_data_ptr<int>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(parts * blocks);
  std::atomic<bool> known{true};
  parallel(parts, 16 * size, [&](int64_t part) {
    for (int64_t p = size * part / parts; p < size * (part + 1) / parts; ++p) {
      if (id[p] < 0 || id[p] >= blocks) {
        known = false;
        return;
      }
      ++next[part * blocks + id[p]];
    }
  });
  TORCH_CHECK_INDEX(known, "a block id is not in [0, ", blocks, "); SFFN_CHECK=1 says which");
  int64_t sum = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    offset[i] = sum;
    for (int64_t part = 0; part < parts; ++part) sum += std::exchange(next[part * blocks + i], sum);
  }
  offset[blocks] = sum;
  parallel(parts, 16 * size, [&](int64_t part) {
    for (int64_t p = size * part / parts; p < size * (part + 1) / parts; ++p)
      to[next[part * blocks + id[p]]++] = static_cast<int>(p);
  });
  return {order, offsets};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_sffn, library) {
  library.def("to_pairs(Tensor rows, Tensor table, Tensor row, Tensor offsets) -> Tensor");
  library.def(
      "to_rows(Tensor pairs, Tensor table, Tensor row, Tensor offsets, int num_rows) -> Tensor");
  library.def("to_table(Tensor pairs, Tensor rows, Tensor row, Tensor offsets) -> Tensor");
  library.def("sort_by_block(Tensor block, int num_blocks) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_sffn, CPU, library) {
  library.impl("to_pairs", to_pairs_op);
  library.impl("to_rows", to_rows_op);
  library.impl("to_table", to_table_op);
  library.impl("sort_by_block", sort_op);
}
