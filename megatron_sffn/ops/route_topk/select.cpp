// The K largest of B scores in each row on a CPU: exact, ids ascending, ties to the lowest id.
//
// A binary search for the largest threshold that at least K scores reach. Each step counts the
// scores of a row that reach a value, a loop that compilers vectorise, and the search stops as soon
// as the count is K. Nothing is sorted or moved.

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

// Maps the bits of a float to an integer of the same order, and back: for negative numbers all bits
// except the sign are flipped. NaN is greater than infinity, or less than -infinity.
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
    // 32 bits, as wide as a float score, so that vectors of scores and of counts have equally many
    // lanes. 4,096 scores at a time cannot overflow it.
    int count = 0;
    for (int64_t i = start; i < std::min(start + 4096, size); ++i) count += scores[i] >= least;
    total += count;
  }
  return total;
}

// Writes the ids of one row; returns false, and writes none, if a score is NaN.
template <typename T>
bool select(const T* scores, int64_t size, int64_t active, int64_t* ids) {
  // Invariant of the search: at least `active` scores reach `low`, fewer reach `high`.
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
    // The distance of two integers of opposite signs can exceed the signed range.
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
  int64_t count = 0;
  if (reached == active) {
    // Without a branch: every id is written, and the next one overwrites it if its score is less.
    for (int64_t i = 0; count < active; ++i) {
      ids[count] = i;
      count += scores[i] >= least;
    }
    return true;
  }
  // More scores equal the threshold than there are places left: the lowest ids win.
  int64_t above = 0;
  for (int64_t i = 0; i < size; ++i) above += scores[i] > least;
  int64_t places = active - above;
  for (int64_t i = 0; count < active; ++i)
    if (scores[i] > least || (scores[i] == least && places-- > 0)) ids[count++] = i;
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
