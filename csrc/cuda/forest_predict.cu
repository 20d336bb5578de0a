// fastens::_forest_predict_native for CUDA tensors: the leaves of all rows, then every output by the rule.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "forest.h"

namespace fastens {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreadsOfBlock = 256;
constexpr int64_t kMostBlocks = 1 << 16;
constexpr int64_t kMostLeaves = int64_t{1} << 27;  // found at a time: 1 GiB

__global__ void __launch_bounds__(kThreadsOfBlock) find_leaves_kernel(const __grid_constant__ ForestJob job) {
  const int64_t count = job.num_trees * job.rows, stride = int64_t{gridDim.x} * kThreadsOfBlock;
  for (int64_t i = int64_t{blockIdx.x} * kThreadsOfBlock + threadIdx.x; i < count; i += stride) {
    job.leaf[i] = leaf_of_row(job, i / job.rows, i % job.rows);
  }
}

__global__ void __launch_bounds__(kThreadsOfBlock) lowest_kernel(const __grid_constant__ ForestJob job) {
  const int64_t stride = int64_t{gridDim.x} * kThreadsOfBlock;
  for (int64_t row = int64_t{blockIdx.x} * kThreadsOfBlock + threadIdx.x; row < job.rows; row += stride) {
    job.lows[job.first + row] = lowest_of_row(job, row);
  }
}

// One block: the smallest of `count` values goes to the first.
__global__ void __launch_bounds__(kThreadsOfBlock) lowest_of_batch_kernel(double* lows, int64_t count) {
  __shared__ double found[kThreadsOfBlock];
  double low = std::numeric_limits<double>::infinity();
  for (int64_t i = threadIdx.x; i < count; i += kThreadsOfBlock) low = smaller(lows[i], low);
  found[threadIdx.x] = low;
  for (int half = kThreadsOfBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) found[threadIdx.x] = smaller(found[threadIdx.x + half], found[threadIdx.x]);
  }
  if (threadIdx.x == 0) lows[0] = found[0];
}

template <Rule kRule>
__global__ void __launch_bounds__(kThreadsOfBlock) combine_kernel(const __grid_constant__ ForestJob job) {
  const int64_t count = job.rows * job.outputs, stride = int64_t{gridDim.x} * kThreadsOfBlock;
  for (int64_t i = int64_t{blockIdx.x} * kThreadsOfBlock + threadIdx.x; i < count; i += stride) {
    combine_members<kRule>(job, i / job.outputs, i % job.outputs);
  }
}

unsigned blocks_for(int64_t work) {
  return static_cast<unsigned>(std::clamp<int64_t>((work + kThreadsOfBlock - 1) / kThreadsOfBlock, 1, kMostBlocks));
}

template <Rule kRule>
void launch_combine(const ForestJob& job, cudaStream_t stream) {
  combine_kernel<kRule><<<blocks_for(job.rows * job.outputs), kThreadsOfBlock, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void combine(const ForestJob& job, Rule rule, cudaStream_t stream) {
  switch (rule) {
    case Rule::kLinear:
      return launch_combine<Rule::kLinear>(job, stream);
    case Rule::kMedian:
      return launch_combine<Rule::kMedian>(job, stream);
    case Rule::kLargest:
      return launch_combine<Rule::kLargest>(job, stream);
    case Rule::kGeometric:
      return launch_combine<Rule::kGeometric>(job, stream);
    default:
      return launch_combine<Rule::kAlternating>(job, stream);
  }
}

struct WeightsOfLaunch {
  double values[256];
};

__global__ void set_weights_kernel(const WeightsOfLaunch weights, double* to, int64_t count) {
  if (threadIdx.x < count) to[threadIdx.x] = weights.values[threadIdx.x];
}

// As arguments of kernels: a CUDA graph that is being recorded keeps those, and no memory of the host.
void set_weights(double* to, const std::vector<double>& values, cudaStream_t stream) {
  WeightsOfLaunch part;
  const size_t most = std::size(part.values);
  for (size_t begin = 0; begin < values.size(); begin += most) {
    const size_t count = std::min(most, values.size() - begin);
    std::copy_n(values.begin() + begin, count, part.values);
    set_weights_kernel<<<1, static_cast<unsigned>(most), 0, stream>>>(part, to + begin, static_cast<int64_t>(count));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void find_leaves(const ForestJob& job, cudaStream_t stream) {
  find_leaves_kernel<<<blocks_for(job.num_trees * job.rows), kThreadsOfBlock, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Rule rule_of(ForestJob& job, const std::string& rule, const std::string& option, const std::vector<double>& values) {
  if (rule == "mean" || rule == "sum") {
    STD_TORCH_CHECK(values.empty() || values.size() == static_cast<size_t>(job.num_members),
                    "forest_predict: `weights` has ", values.size(), " values, expected one per member, ",
                    job.num_members);
    job.divisor = rule == "mean" && values.empty() ? static_cast<double>(job.num_members) : 1.0;
    return Rule::kLinear;
  }
  job.average = option != "lower";
  if (rule == "median") return Rule::kMedian;
  job.absolute = rule == "max_abs";
  if (rule == "dominant" || rule == "max_abs") return Rule::kLargest;
  if (rule == "geometric") {
    STD_TORCH_CHECK(values.size() == 1, "forest_predict: geometric takes one value, eps, got ", values.size());
    job.eps = values[0];
    job.low_step = option == "batch" ? 0 : 1;
    return Rule::kGeometric;
  }
  STD_TORCH_CHECK(rule == "alternating", "forest_predict: unknown rule '", rule, "'");
  return Rule::kAlternating;
}

template <class T>
const T* data_of(const Tensor& tensor, const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == dtype && tensor.is_contiguous(),
                  "forest_predict: `", name, "` has another device, dtype or layout than the op expects");
  return static_cast<const T*>(tensor.data_ptr());
}

// The schema is in fastens/ops/forest_predict.py.
Tensor forest_predict(Tensor x, std::vector<Tensor> trees, int64_t, int64_t, bool double_inputs, std::string rule,
                      std::string option, std::vector<double> values, int64_t seed, int64_t offset) {
  STD_TORCH_CHECK(trees.size() == 10, "forest_predict: `trees` has ", trees.size(), " tensors, expected 10");
  STD_TORCH_CHECK(x.dim() == 2 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
                  "forest_predict: `x` is no float32 or float64 [n, features]");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor rows = torch::stable::contiguous(x);
  ForestJob job;
  job.x = rows.data_ptr();
  job.double_x = x.scalar_type() == ScalarType::Double;
  job.double_inputs = double_inputs;
  job.features = x.size(1);
  job.root = data_of<int64_t>(trees[0], x, ScalarType::Long, "root");
  job.feature = data_of<int64_t>(trees[1], x, ScalarType::Long, "feature");
  job.threshold = data_of<double>(trees[2], x, ScalarType::Double, "threshold");
  job.left = data_of<int64_t>(trees[3], x, ScalarType::Long, "left");
  job.right = data_of<int64_t>(trees[4], x, ScalarType::Long, "right");
  job.default_left = data_of<uint8_t>(trees[5], x, ScalarType::Byte, "default_left");
  job.leaf_of = data_of<int64_t>(trees[6], x, ScalarType::Long, "leaf");
  job.leaves = data_of<double>(trees[7], x, ScalarType::Double, "leaves");
  job.ranges = data_of<int64_t>(trees[8], x, ScalarType::Long, "ranges");
  job.base = data_of<double>(trees[9], x, ScalarType::Double, "base");
  job.num_trees = trees[0].size(0);
  STD_TORCH_CHECK(job.num_trees > 0, "forest_predict: `trees` holds no tree");
  job.num_members = trees[8].size(0) - 1;
  job.outputs = trees[7].size(1);
  job.seed = seed;
  job.offset = offset;
  const int64_t n = x.size(0), shape[] = {n, job.outputs};
  Tensor out = torch::stable::new_empty(x, {shape, 2}, ScalarType::Double);
  job.out = static_cast<double*>(out.data_ptr());
  if (n == 0) return out;

  const Rule kind = rule_of(job, rule, option, values);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const int64_t together = std::clamp<int64_t>(kMostLeaves / job.num_trees, 1, n);
  const int64_t leaf_count[] = {job.num_trees * together}, low_count[] = {n};
  Tensor leaf = torch::stable::new_empty(x, {leaf_count, 1}, ScalarType::Long);
  job.leaf = static_cast<int64_t*>(leaf.data_ptr());
  std::optional<Tensor> lows, weights;
  const auto for_chunks = [&](auto visit) {
    for (job.first = 0; job.first < n; job.first += together) {
      job.rows = std::min(together, n - job.first);
      visit();
    }
  };
  if (kind == Rule::kLinear && !values.empty()) {
    const int64_t count[] = {job.num_members};
    weights = torch::stable::new_empty(x, {count, 1}, ScalarType::Double);
    job.weights = static_cast<const double*>(weights->data_ptr());
    set_weights(static_cast<double*>(weights->data_ptr()), values, stream);
  }
  if (kind == Rule::kGeometric) {
    lows = torch::stable::new_empty(x, {low_count, 1}, ScalarType::Double);
    job.lows = static_cast<double*>(lows->data_ptr());
    for_chunks([&] {
      find_leaves(job, stream);
      lowest_kernel<<<blocks_for(job.rows), kThreadsOfBlock, 0, stream>>>(job);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (job.low_step == 0) {
      lowest_of_batch_kernel<<<1, kThreadsOfBlock, 0, stream>>>(job.lows, n);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  for_chunks([&] {
    find_leaves(job, stream);
    combine(job, kind, stream);
  });
  return out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CUDA, m) { m.impl("_forest_predict_native", TORCH_BOX(&fastens::forest_predict)); }
