// fastens::_aggregate_native: K scores [B, ...] to one by a rule (arXiv 2601.11444), in one pass over the members.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <string>

#include "blocks.h"
#include "draw_members.h"
#include "sorting_network.h"

namespace fastens {
namespace {

struct Job {
  const Members& members;
  std::vector<double> weights{};  // mean, sum: scale * sum_k weights[k] S_k
  double scale = 1;
  bool average = true;                  // median of even K: of the two middle values, or the lower
  double base = 0, shift = 0, eps = 0;  // geometric: exp(mean_k log(((S_k - base) + shift) + eps)) - eps + base - shift
};

template <class W>
FASTENS_INLINE void linear(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  const W scale = static_cast<W>(job.scale);
  alignas(64) W buffer[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members(); ++k) {
      const W* score = widened(members, k, at, n, buffer);
      const W weight = static_cast<W>(job.weights[k]);
      for (int64_t i = 0; i < n; ++i) out[i] = weight * score[i] + (k == 0 ? W(0) : out[i]);
    }
    if (scale != W(1)) {
      for (int64_t i = 0; i < n; ++i) out[i] *= scale;
    }
    narrowed(out, members, at, n);
  }
}

// The S_k of largest |S_k|, signed or not; ties go to the lowest k, NaN wins and stays.
template <class W, bool kSigned>
FASTENS_INLINE void largest(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  alignas(64) W buffer[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members(); ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) {
        const W value = kSigned ? score[i] : std::abs(score[i]);
        const W best = k == 0 ? value : out[i];
        const bool wins = (std::abs(value) > std::abs(best)) | (value != value);
        out[i] = wins ? value : best;
      }
    }
    narrowed(out, members, at, n);
  }
}

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

// The median of K <= 16 values, sorted in registers.
template <class W, int K>
FASTENS_INLINE void small_median(const Job& job, int64_t begin, int64_t end) {
  const Members& members = job.members;
  const bool average = job.average && K % 2 == 0;
  alignas(64) W buffers[K][kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    const W* scores[K];
    for (int64_t k = 0; k < K; ++k) scores[k] = widened(members, k, at, n, buffers[k]);
    for (int64_t i = 0; i < n; ++i) {
      W v[K];
      bool nan = false;
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        v[k] = scores[k][i];
        nan |= v[k] != v[k];
      }
      sort_values<K>(v, std::make_index_sequence<network_size<K>()>());
      const W result = middle(v[(K - 1) / 2], v[K / 2], average);
      out[i] = nan ? std::numeric_limits<W>::quiet_NaN() : result;
    }
    narrowed(out, members, at, n);
  }
}

// The median of any number of values: the network runs over rows of memory.
template <class W>
FASTENS_INLINE void large_median(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t kRow = 64;
  const Members& members = job.members;
  const int64_t num_members = members.num_members();
  const bool average = job.average && num_members % 2 == 0;
  std::vector<std::pair<int, int>> pairs;
  sorting_network(static_cast<int>(num_members), [&](int a, int b) { pairs.emplace_back(a, b); });
  std::vector<W> rows(num_members * kRow);
  W buffer[kRow], out[kRow];
  for (int64_t at = begin; at < end; at += kRow) {
    const int64_t n = std::min(kRow, end - at);
    bool nan[kRow] = {};
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      W* row = rows.data() + k * kRow;
      for (int64_t i = 0; i < n; ++i) {
        row[i] = score[i];
        nan[i] |= score[i] != score[i];
      }
    }
    for (const auto& [a, b] : pairs) {
      W *low = rows.data() + a * kRow, *high = rows.data() + b * kRow;
      for (int64_t i = 0; i < kRow; ++i) put_in_order(low[i], high[i]);
    }
    const W *lower = rows.data() + (num_members - 1) / 2 * kRow, *upper = rows.data() + num_members / 2 * kRow;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = nan[i] ? std::numeric_limits<W>::quiet_NaN() : middle(lower[i], upper[i], average);
    }
    narrowed(out, members, at, n);
  }
}

template <class W, int K = 1>
FASTENS_INLINE void median(const Job& job, int64_t begin, int64_t end) {
  if constexpr (K > 16) {
    large_median<W>(job, begin, end);
  } else if (job.members.num_members() == K) {
    small_median<W, K>(job, begin, end);
  } else {
    median<W, K + 1>(job, begin, end);
  }
}

// The smallest S_k of [begin, end) over all members; NaN wins and stays.
template <class W>
FASTENS_INLINE void smallest(const Job& job, int64_t begin, int64_t end, double* result) {
  const Members& members = job.members;
  alignas(64) W buffer[kBlock], low[kBlock];
  std::fill(low, low + kBlock, std::numeric_limits<W>::infinity());
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t k = 0; k < members.num_members(); ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) low[i] = (score[i] < low[i]) | (score[i] != score[i]) ? score[i] : low[i];
    }
  }
  W lowest = low[0];
  for (int64_t i = 1; i < kBlock; ++i) lowest = (low[i] < lowest) | (low[i] != low[i]) ? low[i] : lowest;
  *result = lowest;
}

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
FASTENS_INLINE void geometric(const Job& job, int64_t begin, int64_t end) {
  using F = Float<W>;
  using Bits = typename F::Bits;
  const Members& members = job.members;
  const int64_t num_members = members.num_members();
  const W base = static_cast<W>(job.base), shift = static_cast<W>(job.shift), eps = static_cast<W>(job.eps);
  const W inverse = W(1) / static_cast<W>(num_members), back = base - shift;
  alignas(64) W buffer[kBlock], product[kBlock], out[kBlock];
  alignas(64) Bits exponent[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t i = 0; i < n; ++i) {
      product[i] = 1;
      exponent[i] = 0;
      out[i] = 0;
    }
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) {
        W x = ((score[i] - base) + shift) + eps;
        out[i] += x < std::numeric_limits<W>::infinity() ? W(0) : x;  // inf and NaN reach the result
        Bits e = split(x);
        W p = product[i] * x;
        e += split(p);
        product[i] = p;
        exponent[i] += e;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      // exponent = K * whole + rest: the whole part needs no rounding
      Bits whole = static_cast<Bits>(std::floor(static_cast<W>(exponent[i]) * inverse));
      const W rest = static_cast<W>(exponent[i] - whole * static_cast<Bits>(num_members));
      W fraction = (log2_mantissa(product[i]) + rest) * inverse;  // [0, 1]
      const bool upper = fraction > W(0.5);
      fraction -= upper ? W(1) : W(0);
      whole += upper ? 1 : 0;
      const W scale = std::bit_cast<W>((whole - 1 + F::kBias) << F::kMantissa);  // 2**whole alone may overflow
      const W mean = exp2_fraction(fraction) * scale * W(2) + out[i];
      out[i] = (mean - eps) + back;
    }
    narrowed(out, members, at, n);
  }
}

// A template is not cloned for each instruction set, a named function is: see check.h.
using Range = void (*)(const Job&, int64_t, int64_t);
FASTENS_CLONES void linear_f32(const Job& job, int64_t begin, int64_t end) { linear<float>(job, begin, end); }
FASTENS_CLONES void linear_f64(const Job& job, int64_t begin, int64_t end) { linear<double>(job, begin, end); }
FASTENS_CLONES void dominant_f32(const Job& job, int64_t begin, int64_t end) { largest<float, true>(job, begin, end); }
FASTENS_CLONES void dominant_f64(const Job& job, int64_t begin, int64_t end) { largest<double, true>(job, begin, end); }
FASTENS_CLONES void max_abs_f32(const Job& job, int64_t begin, int64_t end) { largest<float, false>(job, begin, end); }
FASTENS_CLONES void max_abs_f64(const Job& job, int64_t begin, int64_t end) { largest<double, false>(job, begin, end); }
FASTENS_CLONES void median_f32(const Job& job, int64_t begin, int64_t end) { median<float>(job, begin, end); }
FASTENS_CLONES void median_f64(const Job& job, int64_t begin, int64_t end) { median<double>(job, begin, end); }
FASTENS_CLONES void geometric_f32(const Job& job, int64_t begin, int64_t end) { geometric<float>(job, begin, end); }
FASTENS_CLONES void geometric_f64(const Job& job, int64_t begin, int64_t end) { geometric<double>(job, begin, end); }
FASTENS_CLONES void smallest_f32(const Job& job, int64_t begin, int64_t end, double* result) {
  smallest<float>(job, begin, end, result);
}
FASTENS_CLONES void smallest_f64(const Job& job, int64_t begin, int64_t end, double* result) {
  smallest<double>(job, begin, end, result);
}

void run(const Job& job, Range f32, Range f64) {
  const Range range = job.members.dtype == ScalarType::Double ? f64 : f32;
  torch::stable::parallel_for(0, job.members.count, kGrain,
                              [&](int64_t begin, int64_t end) { range(job, begin, end); });
}

// Two passes over chunks that do not straddle samples: the minimum of each, then the mean of each.
void run_geometric(const Job& job, bool whole_batch) {
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

void run_alternating(const Members& members, int64_t seed, int64_t offset) {
  if (members.count == 0) return;
  const int64_t bytes = members.count / members.batch * members.element_size;
  char* out = static_cast<char*>(members.out.data_ptr());
  torch::stable::parallel_for(0, members.batch, std::max<int64_t>(1, kGrain * 4 / std::max<int64_t>(1, bytes)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) {
                                  const char* from = members.data[draw_member(seed, offset, members.num_members(), b)];
                                  std::memcpy(out + b * bytes, from + b * bytes, bytes);
                                }
                              });
}

// The schema, with what each rule takes as `option` and `values`, is in fastens/ops/aggregate.py.
Tensor aggregate(std::vector<Tensor> scores, std::string rule, std::string option, std::vector<double> values,
                 int64_t seed, int64_t offset) {
  const Members members(scores, "aggregate");
  const size_t num_members = scores.size();
  Job job{members};
  if (rule == "mean" || rule == "sum") {
    STD_TORCH_CHECK(values.empty() || values.size() == num_members, "aggregate: `weights` has ", values.size(),
                    " values, expected one per member, ", num_members);
    job.weights = values.empty() ? std::vector<double>(num_members, 1.0) : values;
    job.scale = rule == "mean" && values.empty() ? 1.0 / static_cast<double>(num_members) : 1.0;
    run(job, linear_f32, linear_f64);
  } else if (rule == "median") {
    job.average = option != "lower";
    run(job, median_f32, median_f64);
  } else if (rule == "dominant") {
    run(job, dominant_f32, dominant_f64);
  } else if (rule == "max_abs") {
    run(job, max_abs_f32, max_abs_f64);
  } else if (rule == "geometric") {
    STD_TORCH_CHECK(values.size() == 1, "aggregate: geometric takes one value, eps, got ", values.size());
    job.eps = values[0];
    run_geometric(job, option == "batch");
  } else {
    STD_TORCH_CHECK(rule == "alternating", "aggregate: unknown rule '", rule, "'");
    run_alternating(members, seed, offset);
  }
  return members.out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_aggregate_native", TORCH_BOX(&fastens::aggregate)); }
