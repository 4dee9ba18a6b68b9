// The three products of a sparse feed-forward layer, and the sort that they need, for CPUs.
//
// A pair is a row of x or y that meets a block. Pairs come sorted by block, those of block i from
// offsets[i] to offsets[i + 1], with rows ascending in a block. `table` is [B, N, D], `pairs` is
// [P, N], `rows` is [R, D]; p is a pair of block i:
//
//   to_pairs   pairs[p]         = rows[row(p)] table[i]^T
//   to_rows    rows[row(p)]    += pairs[p] table[i]
//   to_table   table[i]         = sum over p of pairs[p]^T rows[row(p)]
//
// Choices
// - One register tile, which reads and writes through functions: rows are used where they lie, and
//   no copy of a row per block ever exists.
// - Each number is summed by one thread, in one order: results do not depend on the threads.
// - Blocks of a few cells have no tile to fill. There a product of rows and cells is a dot product,
//   and the sum of a row's cells goes row by row over a part of the table that fits the L2 cache.
// - Vectors are ATen's: nothing here knows an instruction set but for the number of registers.

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

// Vectors in a row of the widest tile, and rows of a tile of V vectors: the sums of a tile, a row
// of its right side and one number of its left side fill the registers.
constexpr int kWidest = kRegisters / 8;
template <int V>
constexpr int kHeight = V == kWidest ? 6 : 8;

// Terms that a tile adds up before the next one does: its right side, 64 KiB, stays in the cache.
constexpr int64_t kDepth = 256;
// Pairs of a block that one thread takes at a time.
constexpr int64_t kPairs = 512;
// Rows and columns of y that one thread takes at a time: 2 MiB, for many passes over them.
constexpr int64_t kRows = 2048;
constexpr int64_t kColumns = 256;
// Cells whose gradient one thread computes at a time.
constexpr int64_t kCells = 96;
// Coefficients so far apart fall on few sets of the L1 cache: a part of them is copied together.
constexpr int64_t kFarApart = 512;
// Multiplications that are worth a thread: 10 microseconds or more.
constexpr int64_t kWork = 1 << 19;
// The same for blocks of few cells, where rows or the table must stay in the L2 cache.
constexpr int64_t kDotRows = 256;
constexpr int64_t kBagVectors = 8;
constexpr int64_t kBagCells = 1024;

// Blocks of fewer cells than this leave too much of a tile empty.
template <typename T>
constexpr int64_t kFewCells = kLanes<T>;
// Up to so many cells, reading and writing a row of y for each block costs more than sorting the
// coefficients by row.
constexpr int64_t kBagBlock = 2;

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f(item) for each of the items; a thread that is done takes the next one. There are no more
// threads than `work`, a number of multiplications, is worth.
template <typename F>
void parallel(int64_t items, int64_t work, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::clamp<int64_t>(work / kWork, 1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next++) < items;) f(item);
  });
}

// Sums of M rows and V vectors: c(m) (+)= sum over k of a(m, k) * b(k). With kPart a row is `width`
// numbers, less than a vector. `a` gives a number, `b` and `c` the address of a row.
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

// A tile under the other: c(m) (+)= sum over k of a(m)(k) * b(k) for `height` rows m, cut into
// tiles of nearly equal height.
template <typename T, int V, bool kPart, typename A, typename B, typename C>
void tiles(int64_t height, int64_t depth, const A& a, const B& b, const C& c, bool add, int width) {
  constexpr int M = kHeight<V>;
  const int64_t count = (height + M - 1) / M;
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

// Cuts `columns` into strips of 2^n vectors, at most V, and a rest: f(Int<vectors>,
// std::bool_constant <part of a vector>, first column, columns).
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

// What a call is about.
template <typename T>
struct Job {
  const int* row;
  const int64_t* offsets;
  int64_t num_rows, blocks, cells, width;

  // Multiplications of a product.
  int64_t work() const { return offsets[blocks] * cells * width; }

  // The pairs of a block whose rows are in [first, last).
  std::pair<int64_t, int64_t> span(int64_t block, int64_t first, int64_t last) const {
    const int* end = row + offsets[block + 1];
    const int* from = std::lower_bound(row + offsets[block], end, first);
    return {from - row, std::lower_bound(from, end, last) - row};
  }
};

// A part [depth, width] of the transpose of a [width, depth] part of a table.
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

// M rows times N cells, each pair of them a dot product.
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
      const auto some = [&](auto height, int64_t p) {
        for (int m = 0; m < height(); ++m) left[m] = rows + job.row[p + m] * job.width;
        const auto with = [&](auto count, int64_t n) {
          dots<T, height(), count()>(left, cells + n * job.width, job.width,
                                     pairs + p * job.cells + n, job.cells);
        };
        int64_t n = 0;
        for (; n + 4 <= job.cells; n += 4) with(Int<4>(), n);
        for (; n < job.cells; ++n) with(Int<1>(), n);
      };
      int64_t p = from;
      for (; p + 4 <= to; p += 4) some(Int<4>(), p);
      for (; p < to; ++p) some(Int<1>(), p);
    }
  });
}

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

// row += sum over j of h[j] * table[cell[j]], for rows of V vectors or a part of one.
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

template <typename T>
void to_rows_by_bags(const Job<T>& job, const T* pairs, const T* table, T* rows) {
  // The table in parts of consecutive cells; in each the coefficients, sorted by row.
  const int64_t blocks = kBagCells / job.cells, parts = (job.blocks + blocks - 1) / blocks;
  const int64_t size = job.offsets[job.blocks] * job.cells;
  std::vector<int64_t> starts(parts * job.num_rows + 1, size);
  const auto cell = std::make_unique_for_overwrite<int[]>(size);
  const auto h = std::make_unique_for_overwrite<T[]>(size);
  parallel(parts, job.work(), [&](int64_t part) {
    const int64_t first = part * blocks, last = std::min(first + blocks, job.blocks);
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
    std::vector<T> near(kBagCells * kBagVectors * kLanes<T>);
    strips<T, kBagVectors>(job.width, [&](auto vectors, auto partial, int64_t n, int width) {
      const int64_t stride = vectors() * kLanes<T>;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t c = part * blocks * job.cells;
        const int64_t count = std::min(blocks * job.cells, job.blocks * job.cells - c);
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(table + (c + i) * job.width + n, width, near.data() + i * stride);
        for (int64_t r = first; r < last; ++r) {
          const int64_t from = starts[part * job.num_rows + r],
                        to = starts[part * job.num_rows + r + 1];
          bag<T, vectors(), partial()>(near.data(), cell.get() + from, h.get() + from, to - from,
                                       rows + r * job.width + n, width);
        }
      }
    });
  });
}

template <typename T>
void to_table(const Job<T>& job, const T* pairs, const T* rows, T* table) {
  // Column by column, so that a part of the rows stays in the cache for all blocks; in a column
  // some blocks, or a part of one.
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
    std::vector<T> near;
    for (int64_t i = group * blocks; i < std::min((group + 1) * blocks, job.blocks); ++i) {
      const int64_t from = job.offsets[i], count = job.offsets[i + 1] - from;
      T* sums = table + (i * job.cells + cell) * job.width + column;
      right.resize(count);
      for (int64_t p = 0; p < count; ++p) right[p] = rows + job.row[from + p] * job.width + column;
      const T* left = pairs + from * job.cells + cell;
      int64_t stride = job.cells;
      if (stride >= kFarApart) {
        near.resize(count * height);
        for (int64_t p = 0; p < count; ++p)
          std::copy_n(left + p * stride, height, near.data() + p * height);
        left = near.data();
        stride = height;
      }
      strips<T, kWidest>(columns, [&](auto vectors, auto part, int64_t n, int width) {
        int64_t k = 0;
        do {  // once for an empty block, whose gradient is zero
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
