// The shifted geometric mean: exp(mean_k log(((S_k - base) + shift) + eps)) - eps + base - shift.
#pragma once

#include <cmath>
#include <limits>

#include "few.h"

namespace fastens::aggregation {
namespace {

template <class W>
struct Float;
template <>
struct Float<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kBias = 127, kLogTerms = 6, kExpTerms = 8;
};
template <>
struct Float<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kLogTerms = 12, kExpTerms = 15;
};

// Split a normal x > 0 into x in [1, 2) and its exponent.
template <class W>
FASTENS_INLINE typename Float<W>::Bits split(W& x) {
  using F = Float<W>;
  using Bits = typename F::Bits;
  constexpr Bits kOne = Bits{F::kBias} << F::kMantissa;
  const Bits bits = std::bit_cast<Bits>(x);
  x = std::bit_cast<W>((bits & ((Bits{1} << F::kMantissa) - 1)) | kOne);
  return (bits >> F::kMantissa) - F::kBias;
}

// log2 of x in [1, 2): the series of artanh((x-1)/(x+1)), about sqrt(2) to keep the argument below 0.172.
template <class W>
FASTENS_INLINE W log2_mantissa(W x) {
  const bool upper = x > W(1.4142135623730951);
  x = upper ? x * W(0.5) : x;
  const W s = (x - W(1)) / (x + W(1)), s2 = s * s;
  W sum = 0;
#pragma GCC unroll 16
  for (int n = Float<W>::kLogTerms - 1; n >= 0; --n) sum = sum * s2 + W(1) / W(2 * n + 1);
  return W(2.8853900817779268) * s * sum + (upper ? W(1) : W(0));  // 2 / ln 2
}

// 2**x for |x| <= 0.51, Taylor.
template <class W>
FASTENS_INLINE W exp2_fraction(W x) {
  const W y = x * W(0.6931471805599453);
  W sum = 1;
#pragma GCC unroll 16
  for (int n = Float<W>::kExpTerms - 1; n >= 1; --n) sum = sum * (y / W(n)) + W(1);
  return sum;
}

// The K-th root of prod_k x_k, x_k = ((S_k - base) + shift) + eps > 0: one logarithm of a product, whose exponents are
// added as integers, in place of K logarithms.
template <class W>
struct Root {
  using F = Float<W>;
  using Bits = typename F::Bits;
  W base, shift, eps, inverse;

  struct Product {
    W mantissa = 1, infinite = 0;  // infinity or NaN, which reach the result
    Bits exponent = 0;
  };

  FASTENS_INLINE void multiply(Product& product, W score) const {
    W x = ((score - base) + shift) + eps;
    product.infinite += x < std::numeric_limits<W>::infinity() ? W(0) : x;
    product.exponent += split(x);
    product.mantissa *= x;
    product.exponent += split(product.mantissa);
  }

  FASTENS_INLINE W root(const Product& product, Bits num_members) const {
    // exponent = K * whole + rest: the whole part needs no rounding
    Bits whole = static_cast<Bits>(std::floor(static_cast<W>(product.exponent) * inverse));
    const W rest = static_cast<W>(product.exponent - whole * num_members);
    W fraction = (log2_mantissa(product.mantissa) + rest) * inverse;  // [0, 1]
    const bool upper = fraction > W(0.5);
    fraction -= upper ? W(1) : W(0);
    whole += upper ? 1 : 0;
    const W scale = std::bit_cast<W>((whole - 1 + F::kBias) << F::kMantissa);  // 2**whole alone may overflow
    const W mean = exp2_fraction(fraction) * scale * W(2) + product.infinite;
    return (mean - eps) + (base - shift);
  }

  template <int K>
  FASTENS_INLINE W of(const W (&values)[K]) const {
    Product product;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) multiply(product, values[k]);
    return root(product, K);
  }
};

template <class W>
FASTENS_INLINE void mean_of_range(const Job& job, int64_t begin, int64_t end) {
  using R = Root<W>;
  const Members& members = job.members;
  const int64_t num_members = members.num_members;
  const R rule{static_cast<W>(job.base), static_cast<W>(job.shift), static_cast<W>(job.eps),
               W(1) / static_cast<W>(num_members)};
  if (combine_few<W, 8>(members, begin, end, rule)) return;
  alignas(64) W buffer[kBlock], out[kBlock];
  typename R::Product products[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    for (int64_t i = 0; i < n; ++i) products[i] = typename R::Product{};
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) rule.multiply(products[i], score[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] = rule.root(products[i], static_cast<typename R::Bits>(num_members));
    narrowed(out, members, at, n);
  }
}

// The smallest S_k of [begin, end) over all members; NaN wins and stays.
template <class W>
FASTENS_INLINE W smaller(W low, W value) {
  return ((value < low) | (value != value)) ? value : low;
}

template <class W>
FASTENS_INLINE void smallest(const Members& members, int64_t begin, int64_t end, double* result) {
  alignas(64) W buffer[kBlock], low[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) low[i] = std::numeric_limits<W>::infinity();
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller_of(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) low[i] = smaller(low[i], score[i]);
    }
  }
  W lowest = low[0];
  for (int64_t i = 1; i < kBlock; ++i) lowest = smaller(lowest, low[i]);
  *result = lowest;
}

}  // namespace
}  // namespace fastens::aggregation
