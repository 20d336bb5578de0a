// What every rule is given, and the walk over the elements that the rules share.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "../blocks.h"

namespace fastens {

struct Job {
  const Members& members;
  std::vector<double> weights{};  // mean, sum: scale * sum_k weights[k] S_k
  double scale = 1;
  bool average = true;                  // median of even K: of the two middle values, or the lower
  double base = 0, shift = 0, eps = 0;  // geometric: exp(mean_k log(((S_k - base) + shift) + eps)) - eps + base - shift
};

// One file each, so that they compile side by side.
void linear(const Job& job);
void median_f32(const Job& job, int64_t begin, int64_t end);
void median_f64(const Job& job, int64_t begin, int64_t end);
void dominant(const Job& job);
void max_abs(const Job& job);
void geometric(const Job& job, bool whole_batch);

// A template is not cloned for each instruction set, a named function is: see check.h.
using Range = void (*)(const Job&, int64_t, int64_t);

inline void run(const Job& job, Range f32, Range f64) {
  const Range range = job.members.dtype == ScalarType::Double ? f64 : f32;
  torch::stable::parallel_for(0, job.members.count, kGrain,
                              [&](int64_t begin, int64_t end) { range(job, begin, end); });
}

// Writes combine(values of the K members) for each element of [begin, end): the K members are read side by side and
// their values stay in registers.
template <class W, int K, class Combine>
FASTENS_INLINE void combine_values(const Members& members, int64_t begin, int64_t end, const Combine& combine) {
  alignas(64) W buffers[K][kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
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
  } else if (members.num_members() == K) {
    combine_values<W, K>(members, begin, end, combine);
    return true;
  } else {
    return combine_few<W, kLargest, K + 1>(members, begin, end, combine);
  }
}

}  // namespace fastens
