// Batcher's odd-even merge sort as a list of compare-exchanges (Batcher, "Sorting networks and their applications",
// AFIPS 1968): the same comparisons for all data, so that many elements are sorted side by side.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

namespace fastens {

// Calls visit(a, b), a < b, for every pair that is to be put in order.
template <class Visit>
constexpr void sorting_network(int n, Visit visit) {
  for (int p = 1; p < n; p *= 2) {
    for (int k = p; k >= 1; k /= 2) {
      for (int j = k % p; j + k < n; j += 2 * k) {
        for (int i = 0; i < k && i + j + k < n; ++i) {
          if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) visit(i + j, i + j + k);
        }
      }
    }
  }
}

template <int N>
constexpr size_t network_size() {
  size_t count = 0;
  sorting_network(N, [&](int, int) { ++count; });
  return count;
}

// The pairs for N values, known to the compiler: comparisons that the result does not need are dropped.
template <int N>
constexpr auto network_pairs() {
  std::array<std::pair<int, int>, network_size<N>()> pairs{};
  size_t next = 0;
  sorting_network(N, [&](int a, int b) { pairs[next++] = {a, b}; });
  return pairs;
}

}  // namespace fastens
