// The CUDA forest's code per row and output, csrc/cuda/forest.h, compiled for the host: what the tests call.
#include <vector>

#include "cuda/forest.h"

using namespace fastens;

// `trees` are the data of the op's ten tensors. out [n, outputs].
extern "C" void forest_on_host(int rule, const void* x, bool double_x, bool double_inputs, int64_t n, int64_t features,
                               void* const* trees, int64_t num_trees, int64_t num_members, int64_t outputs,
                               const double* weights, double divisor, double eps, bool average, bool absolute,
                               bool whole_batch, int64_t chunk, double* out) {
  ForestJob job;
  job.x = x;
  job.double_x = double_x;
  job.double_inputs = double_inputs;
  job.features = features;
  job.root = static_cast<const int64_t*>(trees[0]);
  job.feature = static_cast<const int64_t*>(trees[1]);
  job.threshold = static_cast<const double*>(trees[2]);
  job.left = static_cast<const int64_t*>(trees[3]);
  job.right = static_cast<const int64_t*>(trees[4]);
  job.default_left = static_cast<const uint8_t*>(trees[5]);
  job.leaf_of = static_cast<const int64_t*>(trees[6]);
  job.leaves = static_cast<const double*>(trees[7]);
  job.ranges = static_cast<const int64_t*>(trees[8]);
  job.base = static_cast<const double*>(trees[9]);
  job.num_trees = num_trees;
  job.num_members = num_members;
  job.outputs = outputs;
  job.weights = weights;
  job.divisor = divisor;
  job.eps = eps;
  job.average = average;
  job.absolute = absolute;
  job.low_step = whole_batch ? 0 : 1;
  job.seed = 7;
  job.out = out;
  std::vector<int64_t> leaf(num_trees * chunk);
  std::vector<double> lows(n);
  job.leaf = leaf.data();
  job.lows = lows.data();
  const auto for_chunks = [&](auto visit) {
    for (job.first = 0; job.first < n; job.first += chunk) {
      job.rows = n - job.first < chunk ? n - job.first : chunk;
      for (int64_t i = 0; i < num_trees * job.rows; ++i) leaf[i] = leaf_of_row(job, i / job.rows, i % job.rows);
      for (int64_t row = 0; row < job.rows; ++row) visit(row);
    }
  };
  for_chunks([&](int64_t row) { lows[job.first + row] = lowest_of_row(job, row); });
  if (whole_batch) {
    for (double low : lows) lows[0] = smaller(low, lows[0]);
  }
  for_chunks([&](int64_t row) {
    for (int64_t p = 0; p < outputs; ++p) {
      switch (static_cast<Rule>(rule)) {
        case Rule::kLinear:
          combine_members<Rule::kLinear>(job, row, p);
          break;
        case Rule::kMedian:
          combine_members<Rule::kMedian>(job, row, p);
          break;
        case Rule::kLargest:
          combine_members<Rule::kLargest>(job, row, p);
          break;
        case Rule::kGeometric:
          combine_members<Rule::kGeometric>(job, row, p);
          break;
        default:
          combine_members<Rule::kAlternating>(job, row, p);
      }
    }
  });
}
