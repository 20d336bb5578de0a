// A forest on the GPU: the leaf of a row in a tree, and the rule over the members of one output. The code also compiles
// for the host, where the tests run it.
#pragma once

#include "draw_members.h"
#include "rules.h"

namespace fastens {

// The tensors are those of fastens/reference/forest_predict.py. Rows [first, first + rows) are looked at.
struct ForestJob {
  const void* x = nullptr;     // [n, features], float or double
  bool double_x = false;       // which of them
  bool double_inputs = false;  // compare as float64, otherwise as float32
  int64_t features = 0, outputs = 0, num_trees = 0, num_members = 0, first = 0, rows = 0;
  const int64_t *root = nullptr, *feature = nullptr, *left = nullptr, *right = nullptr, *leaf_of = nullptr;
  const double *threshold = nullptr, *leaves = nullptr;
  const uint8_t* default_left = nullptr;
  const int64_t* ranges = nullptr;  // [num_members + 1]
  const double* base = nullptr;     // [num_members, outputs]
  int64_t* leaf = nullptr;          // [num_trees, rows], found by leaf_of_row
  double* lows = nullptr;           // geometric: [n], the smallest value of a row, or [1] of the batch
  int64_t low_step = 1;
  const double* weights = nullptr;  // [num_members] or null
  double divisor = 1, eps = 0;
  bool average = true, absolute = false;
  int64_t seed = 0, offset = 0;
  double* out = nullptr;  // [n, outputs]
};

FASTENS_DEVICE double compared(const ForestJob& job, int64_t at) {
  const double value =
      job.double_x ? static_cast<const double*>(job.x)[at] : static_cast<double>(static_cast<const float*>(job.x)[at]);
  return job.double_inputs ? value : static_cast<double>(static_cast<float>(value));
}

FASTENS_DEVICE int64_t leaf_of_row(const ForestJob& job, int64_t tree, int64_t row) {
  int64_t node = job.root[tree];
  for (int64_t split = job.feature[node]; split >= 0; split = job.feature[node]) {
    const double value = compared(job, (job.first + row) * job.features + split);
    const bool goes_left = value != value ? job.default_left[node] != 0 : value <= job.threshold[node];
    node = goes_left ? job.left[node] : job.right[node];
  }
  return job.leaf_of[node];
}

FASTENS_DEVICE double member_value(const ForestJob& job, int64_t member, int64_t row, int64_t output) {
  double value = job.base[member * job.outputs + output];
  for (int64_t tree = job.ranges[member]; tree < job.ranges[member + 1]; ++tree) {
    value += job.leaves[job.leaf[tree * job.rows + row] * job.outputs + output];
  }
  return value;
}

FASTENS_DEVICE double lowest_of_row(const ForestJob& job, int64_t row) {
  double low = std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < job.num_members; ++k) {
    for (int64_t p = 0; p < job.outputs; ++p) low = smaller(member_value(job, k, row, p), low);
  }
  return low;
}

// The middle value by its ordered key, bit by bit from the highest, by counting smaller keys.
FASTENS_DEVICE double median_of_members(const ForestJob& job, int64_t row, int64_t output) {
  const int64_t members = job.num_members, rank = (members - 1) / 2;
  uint64_t found = 0, upper = ~uint64_t{0};
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t probe = found | (uint64_t{1} << bit);
    int64_t below = 0;
#pragma unroll 4
    for (int64_t k = 0; k < members; ++k) below += ordered_key(member_value(job, k, row, output)) < probe;
    if (below <= rank) found = probe;
  }
  int64_t not_above = 0;
  bool nan = false;
  for (int64_t k = 0; k < members; ++k) {
    const double value = member_value(job, k, row, output);
    const uint64_t key = ordered_key(value);
    nan |= value != value;
    not_above += key <= found;
    upper = key > found && key < upper ? key : upper;
  }
  const double lower = from_ordered_key<double>(found);
  const double other = not_above > members / 2 ? lower : from_ordered_key<double>(upper);
  return nan ? not_a_number<double>() : middle(lower, other, job.average && members % 2 == 0);
}

template <Rule kRule>
FASTENS_DEVICE void combine_members(const ForestJob& job, int64_t row, int64_t output) {
  double result = 0;
  if constexpr (kRule == Rule::kLinear) {
    for (int64_t k = 0; k < job.num_members; ++k) {
      const double weight = job.weights ? job.weights[k] : 1.0;
      if (weight != 0) result += weight * member_value(job, k, row, output);  // NaN of one that is not used stays out
    }
    result /= job.divisor;
  } else if constexpr (kRule == Rule::kMedian) {
    result = median_of_members(job, row, output);
  } else if constexpr (kRule == Rule::kLargest) {
    result = member_value(job, 0, row, output);
    for (int64_t k = 1; k < job.num_members; ++k) result = larger(member_value(job, k, row, output), result);
    result = job.absolute ? std::abs(result) : result;
  } else if constexpr (kRule == Rule::kGeometric) {
    GeometricMean<double> mean(job.lows[(job.first + row) * job.low_step], job.eps);
    for (int64_t k = 0; k < job.num_members; ++k) mean.add(member_value(job, k, row, output), true);
    result = mean.result(static_cast<int>(job.num_members));
  } else if constexpr (kRule == Rule::kAlternating) {
    result = member_value(job, draw_member(job.seed, job.offset, job.num_members, job.first + row), row, output);
  }
  job.out[(job.first + row) * job.outputs + output] = result;
}

}  // namespace fastens
