// fastens::_aggregate_native: K scores [B, ...] to one by a rule (arXiv 2601.11444), in one pass over the members.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <string>

#include "draw_members.h"
#include "members.h"
#include "sorting_network.h"

namespace fastens {
namespace {

using aggregation::Job;
using aggregation::Kernels;
using aggregation::kGrain;

void run_alternating(const MemberTensors& members, int64_t seed, int64_t offset) {
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

struct alignas(64) Line {
  char bytes[64];
};

// Many members are sorted in memory that each thread is given.
void median(const MemberTensors& members, const Kernels& kernels, const Job& job) {
  const bool wide = members.dtype == ScalarType::Double;
  const int64_t num_members = members.num_members();
  if (num_members <= (wide ? aggregation::kFewDoubles : aggregation::kFewFloats)) {
    return for_elements(members, job, kernels.median);
  }
  const auto range = wide ? kernels.median.of_doubles : kernels.median.of_floats;
  std::vector<aggregation::Pair> pairs;
  sorting_network(static_cast<int>(num_members), [&](int low, int high) { pairs.push_back({low, high}); });
  torch::stable::parallel_for(0, members.count, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Line> rows(num_members * aggregation::kRow * (wide ? 8 : 4) / sizeof(Line));
    Job own = job;
    own.rows = rows.data();
    own.pairs = pairs.data();
    own.num_pairs = static_cast<int64_t>(pairs.size());
    range(own, begin, end);
  });
}

// Two passes over chunks that do not straddle samples: the minimum of each, then the mean of each.
void geometric(const MemberTensors& members, const Kernels& kernels, const Job& job, bool whole_batch) {
  if (members.count == 0) return;
  const bool wide = members.dtype == ScalarType::Double;
  const auto lowest_of = wide ? kernels.lowest_of_doubles : kernels.lowest_of_floats;
  const auto mean_of = wide ? kernels.geometric.of_doubles : kernels.geometric.of_floats;
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
  for_chunks([&](int64_t c, int64_t begin, int64_t end) { lowest_of(job.members, begin, end, &low[c]); });
  const int64_t together = whole_batch ? chunks : per_sample;
  for (int64_t c = 0; c < chunks; c += together) {
    double lowest = low[c];
    for (int64_t i = c; i < c + together; ++i) lowest = low[i] < lowest || std::isnan(low[i]) ? low[i] : lowest;
    std::fill_n(low.begin() + c, together, lowest);
  }
  for_chunks([&](int64_t c, int64_t begin, int64_t end) {
    // m = |min| + eps. For min <= 0 it is -min + eps: adding m to S would lose eps to rounding, so min is taken first.
    Job own{job.members};
    own.base = low[c] > 0 ? 0 : low[c];
    own.shift = low[c] > 0 ? low[c] : std::abs(low[c]) - std::abs(low[c]);  // NaN for an infinite minimum
    own.eps = job.eps;
    mean_of(own, begin, end);
  });
}

// The schema, with what each rule takes as `option` and `values`, is in fastens/ops/aggregate.py.
Tensor aggregate(std::vector<Tensor> scores, std::string rule, std::string option, std::vector<double> values,
                 int64_t seed, int64_t offset) {
  const MemberTensors members(scores, "aggregate");
  const size_t num_members = scores.size();
  const Kernels& kernels = aggregation::kernels_of(isa::chosen());
  const aggregation::Members memory = members.memory();
  Job job{memory};
  if (rule == "mean" || rule == "sum") {
    STD_TORCH_CHECK(values.empty() || values.size() == num_members, "aggregate: `weights` has ", values.size(),
                    " values, expected one per member, ", num_members);
    job.scale = rule == "mean" && values.empty() ? 1.0 / static_cast<double>(num_members) : 1.0;
    if (values.empty()) values.assign(num_members, 1.0);
    job.weights = values.data();
    for_elements(members, job, kernels.linear);
  } else if (rule == "median") {
    job.average = option != "lower";
    median(members, kernels, job);
  } else if (rule == "dominant") {
    for_elements(members, job, kernels.dominant);
  } else if (rule == "max_abs") {
    for_elements(members, job, kernels.max_abs);
  } else if (rule == "geometric") {
    STD_TORCH_CHECK(values.size() == 1, "aggregate: geometric takes one value, eps, got ", values.size());
    job.eps = values[0];
    geometric(members, kernels, job, option == "batch");
  } else {
    STD_TORCH_CHECK(rule == "alternating", "aggregate: unknown rule '", rule, "'");
    run_alternating(members, seed, offset);
  }
  return members.out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_aggregate_native", TORCH_BOX(&fastens::aggregate)); }
