// The shifted geometric mean: exp(mean_k log(((S_k - base) + shift) + eps)) - eps + base - shift.
#include <cmath>
#include <limits>

#include "job.h"

namespace fastens {
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
  const int64_t num_members = members.num_members();
  const R rule{static_cast<W>(job.base), static_cast<W>(job.shift), static_cast<W>(job.eps),
               W(1) / static_cast<W>(num_members)};
  if (combine_few<W, 8>(members, begin, end, rule)) return;
  alignas(64) W buffer[kBlock], out[kBlock];
  typename R::Product products[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    std::fill_n(products, n, typename R::Product{});
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
  return (value < low) | (value != value) ? value : low;
}

template <class W>
FASTENS_INLINE void smallest(const Job& job, int64_t begin, int64_t end, double* result) {
  const Members& members = job.members;
  alignas(64) W buffer[kBlock], low[kBlock];
  std::fill(low, low + kBlock, std::numeric_limits<W>::infinity());
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members(); ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) low[i] = smaller(low[i], score[i]);
    }
  }
  W lowest = low[0];
  for (int64_t i = 1; i < kBlock; ++i) lowest = smaller(lowest, low[i]);
  *result = lowest;
}

FASTENS_CLONES void geometric_f32(const Job& job, int64_t begin, int64_t end) { mean_of_range<float>(job, begin, end); }
FASTENS_CLONES void geometric_f64(const Job& job, int64_t begin, int64_t end) {
  mean_of_range<double>(job, begin, end);
}
FASTENS_CLONES void smallest_f32(const Job& job, int64_t begin, int64_t end, double* result) {
  smallest<float>(job, begin, end, result);
}
FASTENS_CLONES void smallest_f64(const Job& job, int64_t begin, int64_t end, double* result) {
  smallest<double>(job, begin, end, result);
}

}  // namespace

// Two passes over chunks that do not straddle samples: the minimum of each, then the mean of each.
void geometric(const Job& job, bool whole_batch) {
  const Members& members = job.members;
  if (members.count == 0) return;
  const bool wide = members.dtype == ScalarType::Double;
  const int64_t length = members.count / members.batch;
  const int64_t chunk = std::min(length, kGrain), per_sample = (length + chunk - 1) / chunk;
  const int64_t chunks = members.batch * per_sample, grain = std::max<int64_t>(1, kGrain / chunk);
  const auto for_chunks = [&](auto visit) {
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t start = c / per_sample * length, at = start + c % per_sample * chunk;
        visit(c, at, std::min(at + chunk, start + length));
      }
    });
  };
  std::vector<double> low(chunks);
  for_chunks(
      [&](int64_t c, int64_t begin, int64_t end) { (wide ? smallest_f64 : smallest_f32)(job, begin, end, &low[c]); });
  const int64_t together = whole_batch ? chunks : per_sample;
  for (int64_t c = 0; c < chunks; c += together) {
    double lowest = low[c];
    for (int64_t i = c; i < c + together; ++i) lowest = low[i] < lowest || std::isnan(low[i]) ? low[i] : lowest;
    std::fill_n(low.begin() + c, together, lowest);
  }
  for_chunks([&](int64_t c, int64_t begin, int64_t end) {
    // m = |min| + eps. For min <= 0 it is -min + eps: adding m to S would lose eps to rounding, so min is taken first.
    Job own{members};
    own.base = low[c] > 0 ? 0 : low[c];
    own.shift = low[c] > 0 ? low[c] : std::abs(low[c]) - std::abs(low[c]);  // NaN for an infinite minimum
    own.eps = job.eps;
    (wide ? geometric_f64 : geometric_f32)(own, begin, end);
  });
}

}  // namespace fastens
