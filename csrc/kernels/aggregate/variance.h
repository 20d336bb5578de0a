// sum_k (S_k - mean)**2 / K, in one pass over the members.
#pragma once

#include "few.h"

namespace fastens::aggregation {
namespace {

template <class W>
FASTENS_INLINE void variance_of_range(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  const int64_t num_members = members.num_members;
  const W divisor = static_cast<W>(num_members);
  alignas(64) W buffer[kBlock], mean[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    for (int64_t i = 0; i < n; ++i) mean[i] = out[i] = 0;
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) mean[i] += score[i];
    }
    for (int64_t i = 0; i < n; ++i) mean[i] /= divisor;
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) out[i] += (score[i] - mean[i]) * (score[i] - mean[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] /= divisor;
    narrowed(out, members, at, n);
  }
}

}  // namespace
}  // namespace fastens::aggregation
