// The K largest of B scores in each row, exactly, ids ascending and ties to the lowest, for CPUs.
//
// A radix select, one bit at a time: the largest threshold that at least K scores reach. A step
// counts the scores of a row that reach a value, which compilers turn into vector instructions and
// which stops early when the count is K; nothing is sorted or moved.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/bit_cast.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

namespace {

using at::Tensor;

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Integers in the order of the numbers. NaN lies beyond the infinities.
template <typename T>
Bits<T> in_order(Bits<T> bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Bits<T>>::max());
}
template <typename T>
Bits<T> rank_of(T number) {
  return in_order<T>(c10::bit_cast<Bits<T>>(number));
}
template <typename T>
T ranked(Bits<T> rank) {
  return c10::bit_cast<T>(in_order<T>(rank));
}

template <typename T>
int64_t count_from(const T* scores, int64_t size, T least) {
  int64_t total = 0;
  for (int64_t start = 0; start < size; start += 4096) {
    int count = 0;  // 32 bits: as wide as a score, so that a vector of them counts a vector
    for (int64_t i = start; i < std::min(start + 4096, size); ++i) count += scores[i] >= least;
    total += count;
  }
  return total;
}

// The ids of one row; false if a score is not a number.
template <typename T>
bool select(const T* scores, int64_t size, int64_t active, int64_t* ids) {
  // At least `active` scores reach `low`, fewer reach `high`.
  Bits<T> low = rank_of(scores[0]), high = low;
  for (int64_t i = 0; i < size; ++i) {
    low = std::min(low, rank_of(scores[i]));
    high = std::max(high, rank_of(scores[i]));
  }
  constexpr T infinity = std::numeric_limits<T>::infinity();
  if (low < rank_of(-infinity) || high > rank_of(infinity)) return false;
  high += 1;
  int64_t reached = size;
  while (reached != active) {
    using Distance = std::make_unsigned_t<Bits<T>>;
    const Bits<T> middle = low + static_cast<Bits<T>>((Distance(high) - Distance(low)) / 2);
    if (middle == low) break;
    const int64_t count = count_from(scores, size, ranked<T>(middle));
    if (count >= active) {
      low = middle;
      reached = count;
    } else {
      high = middle;
    }
  }
  const T least = ranked<T>(low);
  int64_t found = 0;
  if (reached == active) {
    for (int64_t i = 0; found < active; ++i) {
      ids[found] = i;
      found += scores[i] >= least;
    }
    return true;
  }
  // More scores equal the threshold than there are places: the first of them stay.
  int64_t above = 0;
  for (int64_t i = 0; i < size; ++i) above += scores[i] > least;
  int64_t places = active - above;
  for (int64_t i = 0; found < active; ++i)
    if (scores[i] > least || (scores[i] == least && places-- > 0)) ids[found++] = i;
  return true;
}

std::tuple<Tensor, bool> select_op(const Tensor& scores, int64_t active) {
  Tensor ids = at::empty({scores.size(0), active}, scores.options().dtype(at::kLong));
  const int64_t size = scores.size(1);
  std::atomic<bool> numbers{true};
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "route_topk", [&] {
    const scalar_t* from = scores.const_data_ptr<scalar_t>();
    int64_t* to = ids.mutable_data_ptr<int64_t>();
    at::parallel_for(0, scores.size(0), 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        if (!select(from + r * size, size, active, to + r * active)) numbers = false;
    });
  });
  return {ids, numbers};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_sffn, library) {
  library.def("route_topk(Tensor scores, int num_active) -> (Tensor, bool)");
}

TORCH_LIBRARY_IMPL(megatron_sffn, CPU, library) { library.impl("route_topk", select_op); }
