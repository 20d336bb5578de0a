// fastens::_aggregate_native: K scores [B, ...] to one by a rule (arXiv 2601.11444), in one pass over the members.
#include <torch/csrc/stable/library.h>

#include <string>

#include "aggregate/job.h"
#include "draw_members.h"

namespace fastens {
namespace {

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
    linear(job);
  } else if (rule == "median") {
    job.average = option != "lower";
    run(job, median_f32, median_f64);
  } else if (rule == "dominant") {
    dominant(job);
  } else if (rule == "max_abs") {
    max_abs(job);
  } else if (rule == "geometric") {
    STD_TORCH_CHECK(values.size() == 1, "aggregate: geometric takes one value, eps, got ", values.size());
    job.eps = values[0];
    geometric(job, option == "batch");
  } else {
    STD_TORCH_CHECK(rule == "alternating", "aggregate: unknown rule '", rule, "'");
    run_alternating(members, seed, offset);
  }
  return members.out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_aggregate_native", TORCH_BOX(&fastens::aggregate)); }
