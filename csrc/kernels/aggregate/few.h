// The walk over the elements that the rules share.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

namespace fastens::aggregation {
namespace {

FASTENS_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Writes combine(values of the K members) for each element of [begin, end): the K members are read side by side and
// their values stay in registers.
template <class W, int K, class Combine>
FASTENS_INLINE void combine_values(const Members& members, int64_t begin, int64_t end, const Combine& combine) {
  alignas(64) W buffers[K][kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    const W* scores[K];
    for (int64_t k = 0; k < K; ++k) scores[k] = widened(members, k, at, n, buffers[k]);
    for (int64_t i = 0; i < n; ++i) {
      W values[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) values[k] = scores[k][i];
      out[i] = combine.template of<K>(values);
    }
    narrowed(out, members, at, n);
  }
}

// combine_values for the K of `members` where that is at most kLargest; returns whether it was.
template <class W, int kLargest, int K = 1, class Combine>
FASTENS_INLINE bool combine_few(const Members& members, int64_t begin, int64_t end, const Combine& combine) {
  if constexpr (K > kLargest) {
    return false;
  } else if (members.num_members == K) {
    combine_values<W, K>(members, begin, end, combine);
    return true;
  } else {
    return combine_few<W, kLargest, K + 1>(members, begin, end, combine);
  }
}

}  // namespace
}  // namespace fastens::aggregation
