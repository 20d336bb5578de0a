// Mean and sum: scale * sum_k weights[k] S_k.
#pragma once

#include "few.h"

namespace fastens::aggregation {
namespace {

template <class W>
struct WeightedSum {
  W weights[8], scale;

  template <int K>
  FASTENS_INLINE W of(const W (&values)[K]) const {
    W sum = weights[0] * values[0];
#pragma GCC unroll 8
    for (int k = 1; k < K; ++k) sum += weights[k] * values[k];
    return scale * sum;
  }
};

template <class W>
FASTENS_INLINE void weighted_sum(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  const int64_t num_members = members.num_members;
  WeightedSum<W> few{{}, static_cast<W>(job.scale)};
  for (int64_t k = 0; k < smaller_of(8, num_members); ++k) few.weights[k] = static_cast<W>(job.weights[k]);
  if (combine_few<W, 8>(members, begin, end, few)) return;
  alignas(64) W buffer[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      const W weight = static_cast<W>(job.weights[k]);
      for (int64_t i = 0; i < n; ++i) out[i] = weight * score[i] + (k == 0 ? W(0) : out[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] *= few.scale;
    narrowed(out, members, at, n);
  }
}

}  // namespace
}  // namespace fastens::aggregation
