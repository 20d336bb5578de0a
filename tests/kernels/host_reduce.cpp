// The CUDA kernels' code per element, csrc/cuda/reduce.h, compiled for the host over float32: what the tests call.
#include "cuda/reduce.h"

using namespace fastens;

namespace {

template <int kVec, class Combine>
void over_all(const Job& job) {
  const typename Combine::Weights weights{};
  for (int64_t at = 0; at < job.count; at += kVec) reduce_at<float, kVec, Combine>(job, weights, at);
}

template <Rule kRule, int K = 1>
void few(const Job& job) {
  if constexpr (K <= kFew) {
    if (job.num_members == K) return over_all<4, Few<float, K, 4, kRule>>(job);
    few<kRule, K + 1>(job);
  }
}

template <Rule kRule>
void run(const Job& job, bool in_registers) {
  in_registers ? few<kRule>(job) : over_all<1, Many<float, 1, kRule>>(job);
}

}  // namespace

// `scores` [K, rows, length] contiguous; out [batch, length]; coefficients [3, batch]; lows [rows].
extern "C" void reduce_on_host(int rule, bool in_registers, const float* scores, int num_members, int64_t rows,
                               int64_t length, bool average, bool absolute, double scale, double eps, const float* lows,
                               const float* x, const float* noise, const float* coefficients, const float* guidance,
                               float* out, float* variance) {
  Job job;
  job.num_members = num_members;
  job.batch = guidance ? rows / 2 : rows;
  job.length = length;
  job.count = job.batch * length;
  job.step = in_registers ? 0 : rows * length;
  for (int k = 0; k < num_members && k < kFew; ++k) job.data[k] = scores + k * rows * length;
  job.out = out;
  job.variance = variance;
  job.x = x;
  job.noise = noise;
  job.coefficients = coefficients;
  job.guidance = guidance;
  job.lows = lows;
  job.average = average;
  job.absolute = absolute;
  job.scale = scale;
  job.eps = eps;
  job.seed = 3;
  switch (static_cast<Rule>(rule)) {
    case Rule::kLinear:
      return run<Rule::kLinear>(job, in_registers);
    case Rule::kMedian:
      return run<Rule::kMedian>(job, in_registers);
    case Rule::kLargest:
      return run<Rule::kLargest>(job, in_registers);
    case Rule::kGeometric:
      return run<Rule::kGeometric>(job, in_registers);
    case Rule::kAlternating:
      return over_all<1, Many<float, 1, Rule::kAlternating>>(job);
    case Rule::kNone:
      return run<Rule::kNone>(job, in_registers);
  }
}
