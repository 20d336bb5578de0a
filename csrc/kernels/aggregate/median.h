// The elementwise median by sorting networks: in registers for few members, over rows of memory for many.
#pragma once

#include <limits>
#include <utility>

#include "few.h"
#include "sorting_network.h"

namespace fastens::aggregation {
namespace {

template <class W>
FASTENS_INLINE void put_in_order(W& a, W& b) {
  const W low = a < b ? a : b, high = a < b ? b : a;
  a = low;
  b = high;
}

template <class W>
FASTENS_INLINE W middle(W lower, W upper, bool average) {
  return average ? W(0.5) * lower + W(0.5) * upper : lower;
}

template <int K, class W, size_t... I>
FASTENS_INLINE void sort_values(W (&v)[K], std::index_sequence<I...>) {
  [[maybe_unused]] constexpr auto kPairs = network_pairs<K>();
  (put_in_order(v[kPairs[I].first], v[kPairs[I].second]), ...);
}

template <class W>
struct Median {
  bool average;

  template <int K>
  FASTENS_INLINE W of(const W (&values)[K]) const {
    W v[K];
    bool nan = false;
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      v[k] = values[k];
      nan |= v[k] != v[k];
    }
    sort_values<K>(v, std::make_index_sequence<network_size<K>()>());
    const W result = middle(v[(K - 1) / 2], v[K / 2], average && K % 2 == 0);
    return nan ? std::numeric_limits<W>::quiet_NaN() : result;
  }
};

template <class W>
FASTENS_INLINE void median_of_rows(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  const int64_t num_members = members.num_members;
  const bool average = job.average && num_members % 2 == 0;
  W* const rows = static_cast<W*>(__builtin_assume_aligned(job.rows, 64));
  W buffer[kRow], out[kRow];
  for (int64_t at = begin; at < end; at += kRow) {
    const int64_t n = smaller_of(kRow, end - at);
    bool nan[kRow] = {};
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      W* row = rows + k * kRow;
      for (int64_t i = 0; i < n; ++i) {
        row[i] = score[i];
        nan[i] |= score[i] != score[i];
      }
    }
    for (int64_t p = 0; p < job.num_pairs; ++p) {
      W *low = rows + job.pairs[p].low * kRow, *high = rows + job.pairs[p].high * kRow;
      for (int64_t i = 0; i < kRow; ++i) put_in_order(low[i], high[i]);
    }
    const W *lower = rows + (num_members - 1) / 2 * kRow, *upper = rows + num_members / 2 * kRow;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = nan[i] ? std::numeric_limits<W>::quiet_NaN() : middle(lower[i], upper[i], average);
    }
    narrowed(out, members, at, n);
  }
}

// `kFew`: the most members that are sorted in registers.
template <class W, int kFew>
FASTENS_INLINE void median_of_range(const Job& job, int64_t begin, int64_t end) {
  if (!combine_few<W, kFew>(job.members, begin, end, Median<W>{job.average})) median_of_rows<W>(job, begin, end);
}

}  // namespace
}  // namespace fastens::aggregation
