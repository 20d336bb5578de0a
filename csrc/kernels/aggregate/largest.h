// Dominant and max_abs: the S_k of largest |S_k|, signed or not; ties go to the lowest k, NaN wins and stays.
#pragma once

#include <cmath>

#include "few.h"

namespace fastens::aggregation {
namespace {

template <class W, bool kSigned>
struct Largest {
  FASTENS_INLINE static W first(W value) { return kSigned ? value : std::abs(value); }

  FASTENS_INLINE static W larger(W best, W value) {
    const W size = std::abs(value);
    const bool wins = (size > std::abs(best)) | (value != value);
    return wins ? (kSigned ? value : size) : best;
  }

  template <int K>
  FASTENS_INLINE W of(const W (&values)[K]) const {
    W best = first(values[0]);
#pragma GCC unroll 8
    for (int k = 1; k < K; ++k) best = larger(best, values[k]);
    return best;
  }
};

template <class W, bool kSigned>
FASTENS_INLINE void largest(const Job& job, int64_t begin, int64_t end) {
  using Rule = Largest<W, kSigned>;
  const Members& members = job.members;
  if (combine_few<W, 8>(members, begin, end, Rule{})) return;
  alignas(64) W buffer[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) out[i] = k == 0 ? Rule::first(score[i]) : Rule::larger(out[i], score[i]);
    }
    narrowed(out, members, at, n);
  }
}

}  // namespace
}  // namespace fastens::aggregation
