// One vector of the result of a job: the K members' elements, the rule, guidance, update and variance.
#pragma once

#include "draw_members.h"
#include "rules.h"

namespace fastens {

// Rule and variance of K <= 16 members that are all held in registers.
template <class T, int K, int kVec, Rule kRule>
struct Few {
  using W = typename Wide<T>::type;
  using Weights = FewWeights;

  static FASTENS_DEVICE void combine(const Job& job, const Weights& weights, int64_t row, int64_t at, W (&result)[kVec],
                                     W (&variance)[kVec]) {
    Pack<T, kVec> packs[K];
#pragma unroll
    for (int k = 0; k < K; ++k) packs[k] = load<T, kVec>(job.data[k], at);
    const W lowest = kRule == Rule::kGeometric ? static_cast<const W*>(job.lows)[row * job.low_step] : W(0);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      W v[K];
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = static_cast<W>(packs[k].element[i]);
      if (job.variance) {
        W mean = 0, sum = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) mean += v[k];
        mean *= W(1) / W(K);
#pragma unroll
        for (int k = 0; k < K; ++k) sum += (v[k] - mean) * (v[k] - mean);
        variance[i] = sum * (W(1) / W(K));
      }
      W r = 0;
      if constexpr (kRule == Rule::kLinear) {
#pragma unroll
        for (int k = 0; k < K; ++k) r += job.weighted ? static_cast<W>(weights.weight[k]) * v[k] : v[k];
        r *= static_cast<W>(job.scale);
      } else if constexpr (kRule == Rule::kMedian) {
        r = median<W, K>(v, job.average);
      } else if constexpr (kRule == Rule::kLargest) {
        r = v[0];
#pragma unroll
        for (int k = 1; k < K; ++k) r = larger(v[k], r);
        r = job.absolute ? std::abs(r) : r;
      } else if constexpr (kRule == Rule::kGeometric) {
        GeometricMean<W> mean(lowest, job.eps);
#pragma unroll
        for (int k = 0; k < K; ++k) mean.add(v[k], false);
        r = mean.result(K);
      }
      result[i] = r;
    }
  }
};

// Rule and variance of any number of members, read in a loop; also of few whose addresses allow no wide access.
template <class T, int kVec, Rule kRule>
struct Many {
  using W = typename Wide<T>::type;
  using Weights = ManyWeights;

  template <class Visit>
  static FASTENS_DEVICE void each(const Job& job, int64_t at, Visit visit) {
    for (int k = 0; k < job.num_members; ++k) {
      const Pack<T, kVec> pack = load<T, kVec>(member<T>(job, k), at);
#pragma unroll
      for (int i = 0; i < kVec; ++i) visit(k, i, static_cast<W>(pack.element[i]));
    }
  }

  // The ordered key of the middle value, bit by bit from the highest, by counting smaller keys.
  static FASTENS_DEVICE void median(const Job& job, int64_t at, W (&result)[kVec]) {
    using U = typename Bits<W>::Unsigned;
    const int num_members = job.num_members, rank = (num_members - 1) / 2;
    U found[kVec] = {}, upper[kVec];
    int below[kVec];
    bool nan[kVec] = {};
    for (int bit = 8 * sizeof(U) - 1; bit >= 0; --bit) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) below[i] = 0;
      each(job, at, [&](int, int i, W v) { below[i] += ordered_key(v) < (found[i] | (U{1} << bit)); });
#pragma unroll
      for (int i = 0; i < kVec; ++i) found[i] |= below[i] <= rank ? U{1} << bit : U{0};
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      below[i] = 0;
      upper[i] = ~U{0};
    }
    each(job, at, [&](int, int i, W v) {
      const U key = ordered_key(v);
      nan[i] |= v != v;
      below[i] += key <= found[i];
      upper[i] = key > found[i] && key < upper[i] ? key : upper[i];
    });
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const W lower = from_ordered_key<W>(found[i]);
      const W other = below[i] > num_members / 2 ? lower : from_ordered_key<W>(upper[i]);
      const W value = middle(lower, other, job.average && num_members % 2 == 0);
      result[i] = nan[i] ? not_a_number<W>() : value;
    }
  }

  static FASTENS_DEVICE void combine(const Job& job, const Weights& weights, int64_t row, int64_t at, W (&result)[kVec],
                                     W (&variance)[kVec]) {
    const W inverse = W(1) / static_cast<W>(job.num_members);
#pragma unroll
    for (int i = 0; i < kVec; ++i) result[i] = variance[i] = 0;
    if (job.variance) {
      W mean[kVec] = {};
      each(job, at, [&](int, int i, W v) { mean[i] += v; });
      each(job, at, [&](int, int i, W v) { variance[i] += (v - mean[i] * inverse) * (v - mean[i] * inverse); });
#pragma unroll
      for (int i = 0; i < kVec; ++i) variance[i] *= inverse;
    }
    if constexpr (kRule == Rule::kLinear) {
      each(job, at, [&](int k, int i, W v) { result[i] += job.weighted ? static_cast<W>(weights.weight[k]) * v : v; });
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] *= static_cast<W>(job.scale);
    } else if constexpr (kRule == Rule::kMedian) {
      median(job, at, result);
    } else if constexpr (kRule == Rule::kLargest) {
      each(job, at, [&](int k, int i, W v) { result[i] = k == 0 ? v : larger(v, result[i]); });
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] = job.absolute ? std::abs(result[i]) : result[i];
    } else if constexpr (kRule == Rule::kGeometric) {
      const W lowest = static_cast<const W*>(job.lows)[row * job.low_step];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        GeometricMean<W> mean(lowest, job.eps);
        for (int k = 0; k < job.num_members; ++k) mean.add(static_cast<W>(member<T>(job, k)[at + i]), true);
        result[i] = mean.result(job.num_members);
      }
    } else if constexpr (kRule == Rule::kAlternating) {
      const int64_t drawn = draw_member(job.seed, job.offset, job.num_members, row);
      const Pack<T, kVec> pack = load<T, kVec>(member<T>(job, drawn), at);
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] = static_cast<W>(pack.element[i]);
    }
  }
};

// Elements [at, at + kVec) of the result, which lie in one sample.
template <class T, int kVec, class Combine>
FASTENS_DEVICE void reduce_at(const Job& job, const typename Combine::Weights& weights, int64_t at) {
  using W = typename Wide<T>::type;
  const int64_t sample = job.batch == 1 ? 0 : at / job.length;
  W result[kVec], value[kVec], variance[kVec];
  Combine::combine(job, weights, sample, at, result, variance);
  if (job.variance) store<T, kVec>(job.variance, at, variance);
  if (job.guidance) {
    Combine::combine(job, weights, sample + job.batch, at + job.count, value, variance);
    if (job.variance) store<T, kVec>(job.variance, at + job.count, variance);
    const W strength = static_cast<const W*>(job.guidance)[sample];
#pragma unroll
    for (int i = 0; i < kVec; ++i) result[i] += strength * (value[i] - result[i]);
  }
  if (!job.out) return;
  if (job.coefficients) {
    const W* coefficients = static_cast<const W*>(job.coefficients) + sample;
    const W a = coefficients[0], b = coefficients[job.batch], c = coefficients[2 * job.batch];
#pragma unroll
    for (int i = 0; i < kVec; ++i) result[i] *= b;
    if (job.x) {
      const Pack<T, kVec> pack = load<T, kVec>(job.x, at);
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] += a * static_cast<W>(pack.element[i]);
    }
    if (job.noise) {
      const Pack<T, kVec> pack = load<T, kVec>(job.noise, at);
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] += c * static_cast<W>(pack.element[i]);
    }
  }
  store<T, kVec>(job.out, at, result);
}

}  // namespace fastens
