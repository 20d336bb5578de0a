// fastens::_aggregate_native, _aggregate_update_native and _member_variance_native for CUDA tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/flat.h"
#include "launch.h"

namespace fastens {

FASTENS_REDUCE(extern, float)
FASTENS_REDUCE(extern, double)
FASTENS_REDUCE(extern, c10::BFloat16)
FASTENS_REDUCE(extern, c10::Half)

namespace {

using Optional = std::optional<Tensor>;

Tensor like(const Tensor& layout, const Tensor& x) {
  if (same_strides(x, layout)) return x;
  Tensor copy = torch::stable::empty_like(layout);
  torch::stable::copy_(copy, x);
  return copy;
}

// Members of equal distance are read where they are; a list beyond kFew of others is copied into one stack.
Tensor set_members(Job& job, const std::vector<Tensor>& members) {
  const auto address = [&](size_t k) { return reinterpret_cast<intptr_t>(members[k].data_ptr()); };
  job.num_members = static_cast<int>(members.size());
  for (size_t k = 0; k < std::min<size_t>(members.size(), kFew); ++k) job.data[k] = members[k].data_ptr();
  if (members.size() <= kFew) return members[0];
  const int64_t size = static_cast<int64_t>(members[0].element_size()), step = address(1) - address(0);
  bool equal = step % size == 0 && step != 0;
  for (size_t k = 2; k < members.size(); ++k) equal &= address(k) - address(0) == static_cast<int64_t>(k) * step;
  if (equal) {
    job.step = step / size;
    return members[0];
  }
  const int64_t total[] = {static_cast<int64_t>(members.size()) * members[0].numel()};
  Tensor stack = torch::stable::new_empty(members[0], {total, 1});
  job.step = members[0].numel();
  job.data[0] = stack.data_ptr();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(members[0].get_device_index(), &stream));
  for (size_t k = 0; k < members.size(); ++k) {
    STD_CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(stack.data_ptr()) + k * job.step * size, members[k].data_ptr(),
                                   job.step * size, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
  }
  return stack;
}

Rule rule_of(Job& job, ManyWeights& weights, const std::string& rule, const std::string& option,
             const std::vector<double>& values) {
  if (rule == "mean" || rule == "sum") {
    STD_TORCH_CHECK(values.empty() || values.size() == static_cast<size_t>(job.num_members),
                    "aggregate: `weights` has ", values.size(), " values, expected one per member, ", job.num_members);
    STD_TORCH_CHECK(values.size() <= kMaxWeights, "aggregate: more than ", kMaxWeights,
                    " weights; use backend='triton' or 'reference'");
    job.weighted = !values.empty();
    std::copy(values.begin(), values.end(), weights.weight);
    job.scale = rule == "mean" && values.empty() ? 1.0 / job.num_members : 1.0;
    return Rule::kLinear;
  }
  if (rule == "median") {
    job.average = option != "lower";
    return Rule::kMedian;
  }
  if (rule == "dominant" || rule == "max_abs") {
    job.absolute = rule == "max_abs";
    return Rule::kLargest;
  }
  if (rule == "geometric") {
    STD_TORCH_CHECK(values.size() == 1, "aggregate: geometric takes one value, eps, got ", values.size());
    job.eps = values[0];
    return Rule::kGeometric;
  }
  STD_TORCH_CHECK(rule == "alternating" || rule == "none", "aggregate: unknown rule '", rule, "'");
  return rule == "none" ? Rule::kNone : Rule::kAlternating;
}

template <class T>
void run(Job& job, Rule rule, const ManyWeights& weights, int64_t rows, bool whole_batch, const Tensor& first,
         const Launch& launch) {
  std::optional<Tensor> parts, lows;
  if (rule == Rule::kGeometric) {
    const auto wide = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    const int64_t sizes[] = {rows * parts_of(job, rows, launch)}, results[] = {whole_batch ? 1 : rows};
    parts = torch::stable::new_empty(first, {sizes, 1}, wide);
    lows = torch::stable::new_empty(first, {results, 1}, wide);
    smallest<T>(job, rows, whole_batch, parts->data_ptr(), lows->data_ptr(), launch);
    job.lows = lows->data_ptr();
    job.low_step = whole_batch ? 0 : 1;
  }
  reduce<T>(job, rule, weights, launch);
}

// Everything that is wanted of K members on one GPU. `layout` is a tensor of the members' shape and of their layout.
std::tuple<Tensor, Tensor> all(const std::vector<Tensor>& scores, const std::string& rule, const std::string& option,
                               const std::vector<double>& values, int64_t seed, int64_t offset, const Optional& x,
                               const Optional& noise, const Optional& coefficients, const Optional& guidance,
                               bool variance) {
  STD_TORCH_CHECK(!scores.empty(), "aggregate: `scores` has no member; expected K >= 1");
  const Tensor& first = scores[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  // half of the rows lie as all of them do: a single row is flat by itself, whatever is between the rows
  const auto new_like = [flat = is_flat(first)](const Tensor& a) {
    return flat ? torch::stable::empty_like(a) : torch::stable::new_empty(a, a.sizes());
  };
  const Tensor layout = new_like(first);
  std::vector<Tensor> members;
  for (size_t k = 0; k < scores.size(); ++k) {
    const Tensor& score = scores[k];
    bool same = score.is_cuda() && score.get_device_index() == first.get_device_index() &&
                score.scalar_type() == first.scalar_type() && score.sizes().size() == first.sizes().size();
    for (size_t d = 0; same && d < first.sizes().size(); ++d) same = score.size(d) == first.size(d);
    STD_TORCH_CHECK(same, "aggregate: `scores[", k, "]` differs from `scores[0]` in shape, dtype or device");
    members.push_back(like(layout, score));
  }
  const int64_t zero[] = {0};
  Tensor out = torch::stable::new_empty(first, {zero, 1}), spread = out;
  Tensor half = first;
  if (guidance) half = torch::stable::narrow(half, 0, 0, first.size(0) / 2);
  if (rule != "none") out = new_like(half);
  if (variance) spread = layout;
  if (first.numel() == 0) return {out, spread};

  Job job;
  ManyWeights weights;
  const Tensor stack = set_members(job, members);
  const Rule kind = rule_of(job, weights, rule, option, values);
  const int64_t rows = first.size(0), halves = guidance ? 2 : 1;
  job.batch = rows / halves;
  job.count = first.numel() / halves;
  job.length = first.numel() / rows;
  job.seed = seed;
  job.offset = offset;
  if (rule != "none") job.out = out.data_ptr();
  if (variance) job.variance = spread.data_ptr();
  const auto wide = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> kept;
  const auto keep = [&](const Tensor& t) {
    kept.push_back(t);
    return t.data_ptr();
  };
  if (x) job.x = keep(like(out, *x));
  if (noise) job.noise = keep(like(out, *noise));
  if (coefficients) job.coefficients = keep(torch::stable::contiguous(torch::stable::to(*coefficients, wide)));
  if (guidance) job.guidance = keep(torch::stable::contiguous(torch::stable::to(*guidance, wide)));
  const bool per_sample = kind == Rule::kGeometric || kind == Rule::kAlternating || job.coefficients || job.guidance;
  const bool whole_batch = option == "batch";
  if (!per_sample) {
    job.batch = 1;
    job.length = job.count;
  }
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, first.get_device_index()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
  const Launch launch{static_cast<cudaStream_t>(stream), int64_t{processors} * kBlocksPerProcessor};
  switch (first.scalar_type()) {
    case ScalarType::Float:
      run<float>(job, kind, weights, rows, whole_batch, first, launch);
      break;
    case ScalarType::Double:
      run<double>(job, kind, weights, rows, whole_batch, first, launch);
      break;
    case ScalarType::BFloat16:
      run<c10::BFloat16>(job, kind, weights, rows, whole_batch, first, launch);
      break;
    case ScalarType::Half:
      run<c10::Half>(job, kind, weights, rows, whole_batch, first, launch);
      break;
    default:
      STD_TORCH_CHECK(false, "aggregate: `scores` has a dtype that this kernel does not take; use backend='reference'");
  }
  return {out, spread};
}

// The schemas are in fastens/ops/<op>.py.
Tensor aggregate(std::vector<Tensor> scores, std::string rule, std::string option, std::vector<double> values,
                 int64_t seed, int64_t offset) {
  return std::get<0>(all(scores, rule, option, values, seed, offset, {}, {}, {}, {}, false));
}

Tensor member_variance(std::vector<Tensor> scores) {
  return std::get<1>(all(scores, "none", "", {}, 0, 0, {}, {}, {}, {}, true));
}

std::tuple<Tensor, Tensor> aggregate_update(std::vector<Tensor> scores, std::string rule, std::string option,
                                            std::vector<double> values, int64_t seed, int64_t offset, Optional x,
                                            Optional noise, Optional coefficients, Optional guidance, bool variance) {
  return all(scores, rule, option, values, seed, offset, x, noise, coefficients, guidance, variance);
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CUDA, m) {
  m.impl("_aggregate_native", TORCH_BOX(&fastens::aggregate));
  m.impl("_member_variance_native", TORCH_BOX(&fastens::member_variance));
  m.impl("_aggregate_update_native", TORCH_BOX(&fastens::aggregate_update));
}
