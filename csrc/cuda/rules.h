// The rules on the K values of one element, and the arithmetic of the geometric mean and of ordered keys (arXiv
// 2601.11444). W is float or double.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "job.h"
#include "sorting_network.h"

namespace fastens {

template <class W>
FASTENS_DEVICE W not_a_number() {
  return static_cast<W>(NAN);
}

// The one of larger magnitude; `best` where they tie, and NaN wins and stays.
template <class W>
FASTENS_DEVICE W larger(W value, W best) {
  return std::abs(value) > std::abs(best) || value != value ? value : best;
}

// The smaller one; NaN wins and stays.
template <class W>
FASTENS_DEVICE W smaller(W value, W best) {
  return value < best || value != value ? value : best;
}

template <int A, int B, class W, int K>
FASTENS_DEVICE void put_in_order(W (&v)[K]) {
  const W low = v[A] < v[B] ? v[A] : v[B], high = v[A] < v[B] ? v[B] : v[A];
  v[A] = low;
  v[B] = high;
}

template <int K>
struct Network {
  static constexpr auto kPairs = network_pairs<K>();
  template <class W, size_t... I>
  static FASTENS_DEVICE void sort(W (&v)[K], std::index_sequence<I...>) {
    (put_in_order<kPairs[I].first, kPairs[I].second>(v), ...);
  }
};

template <class W>
FASTENS_DEVICE W middle(W lower, W upper, bool average) {
  return average ? W(0.5) * lower + W(0.5) * upper : lower;
}

template <class W, int K>
FASTENS_DEVICE W median(W (&v)[K], bool average) {
  bool nan = false;
#pragma unroll
  for (int k = 0; k < K; ++k) nan |= v[k] != v[k];
  Network<K>::sort(v, std::make_index_sequence<network_size<K>()>());
  const W result = middle(v[(K - 1) / 2], v[K / 2], average && K % 2 == 0);
  return nan ? not_a_number<W>() : result;
}

// A float as its bits, and back.
template <class W>
struct Bits;
template <>
struct Bits<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Bits<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <class To, class From>
FASTENS_DEVICE To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// An unsigned integer that orders as the floats do, and its float.
template <class W>
FASTENS_DEVICE typename Bits<W>::Unsigned ordered_key(W x) {
  using U = typename Bits<W>::Unsigned;
  constexpr U kSign = U{1} << (8 * sizeof(U) - 1);
  const U bits = as<U>(x);
  return bits & kSign ? ~bits : bits | kSign;
}

template <class W>
FASTENS_DEVICE W from_ordered_key(typename Bits<W>::Unsigned key) {
  using U = typename Bits<W>::Unsigned;
  constexpr U kSign = U{1} << (8 * sizeof(U) - 1);
  return as<W>(static_cast<U>(key & kSign ? key & ~kSign : ~key));
}

// The K-th root of a product of x_k = ((S_k - base) + shift) + eps > 0: one logarithm of the product of the mantissas,
// and the exponents added as integers, in place of K logarithms.
template <class W>
struct GeometricMean {
  using S = typename Bits<W>::Signed;
  W base, shift, eps, product = 1, beyond = 0;
  S exponent = 0;

  // m = |min| + eps. For min <= 0 it is -min + eps: adding m to S would lose eps to rounding, so min is taken first.
  FASTENS_DEVICE GeometricMean(W lowest, double eps) : base(lowest > 0 ? W(0) : lowest), eps(static_cast<W>(eps)) {
    const W size = std::abs(lowest);
    shift = size - (lowest > 0 ? W(0) : size);  // NaN for an infinite minimum
  }

  static FASTENS_DEVICE S split(W& x) {
    constexpr S kOne = S{Bits<W>::kBias} << Bits<W>::kMantissa, kFraction = (S{1} << Bits<W>::kMantissa) - 1;
    const S bits = as<S>(x);
    x = as<W>(static_cast<S>((bits & kFraction) | kOne));
    return (bits >> Bits<W>::kMantissa) - Bits<W>::kBias;
  }

  // Up to 16 mantissas below 2 need no carry.
  FASTENS_DEVICE void add(W score, bool carry) {
    W x = ((score - base) + shift) + eps;
    beyond += x < std::numeric_limits<W>::infinity() ? W(0) : x;  // inf and NaN reach the result
    exponent += split(x);
    product *= x;
    if (carry) exponent += split(product);
  }

  FASTENS_DEVICE W result(int num_members) const {
    const W inverse = W(1) / static_cast<W>(num_members);
    // exponent = K * whole + rest: the whole part needs no rounding
    const S whole = static_cast<S>(std::floor(static_cast<W>(exponent) * inverse));
    const W rest = static_cast<W>(exponent - whole * static_cast<S>(num_members));
    const W fraction = std::exp2((std::log2(product) + rest) * inverse);
    const W power = as<W>(static_cast<S>((whole - 1 + Bits<W>::kBias) << Bits<W>::kMantissa));  // 2**whole may overflow
    return ((fraction * power * W(2) + beyond) - eps) + (base - shift);
  }
};

}  // namespace fastens
