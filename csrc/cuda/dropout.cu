// fastens::_dropout_native for CUDA tensors: activation and dropout of rows [R, ...], contiguous or channels last.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <string>

#include "cpu/flat.h"
#include "drop.h"
#include "launch.h"

namespace fastens {
namespace {

template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const __grid_constant__ DropJob job) {
  const int64_t stride = int64_t{gridDim.x} * kThreads, items = job.items();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < items; i += stride) drop_at<T, kPacked>(job, i);
}

template <class T>
void launch(const DropJob& job, const Launch& launch) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (kWords * sizeof(T)) == 0; };
  const unsigned blocks = launch.blocks((job.items() + kThreads - 1) / kThreads);
  if (!job.channels_last && job.space % kWords == 0 && aligned(job.x) && aligned(job.out)) {
    dropout_kernel<T, true><<<blocks, kThreads, 0, launch.stream>>>(job);
  } else {
    dropout_kernel<T, false><<<blocks, kThreads, 0, launch.stream>>>(job);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Rows first and channels last, with more than one of both channels and places.
bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims < 3 || x.is_contiguous() || x.stride(1) != 1) return false;
  int64_t expected = x.size(1);
  for (int64_t d = dims - 1; d > 1; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

// One int64 on the device of x for each of its rows.
const int64_t* numbers_of(const Tensor& numbers, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(numbers.is_cuda() && numbers.get_device_index() == x.get_device_index() &&
                      numbers.scalar_type() == ScalarType::Long && numbers.dim() == 1 && numbers.size(0) == x.size(0) &&
                      numbers.is_contiguous(),
                  "dropout: `", name, "` must be contiguous int64 on the device of `x`, one number for each of ",
                  x.size(0), " rows");
  return static_cast<const int64_t*>(numbers.data_ptr());
}

Tensor dropout(const Tensor& given, const Tensor& members, const std::optional<Tensor>& samples, double p, int64_t key,
               int64_t evaluation, std::string activation) {
  STD_TORCH_CHECK(given.is_cuda() && given.dim() >= 1, "dropout: `x` must be rows [R, ...] on a GPU");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout: `p` is ", p, ", expected a probability");
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  DropJob job;
  job.channels_last = is_channels_last(given);
  const Tensor x = job.channels_last ? given : torch::stable::contiguous(given);
  Tensor out = torch::stable::empty_like(x);
  job.members = numbers_of(members, x, "members");
  job.samples = samples ? numbers_of(*samples, x, "samples") : nullptr;
  job.activation = activation_of(activation);
  STD_TORCH_CHECK(job.activation != kUnknownActivation, "dropout: unknown activation '", activation, "'");
  if (x.numel() == 0) return out;
  job.x = x.data_ptr();
  job.out = out.data_ptr();
  job.rows = x.size(0);
  job.channels = job.channels_last ? x.size(1) : 1;
  job.space = x.numel() / job.rows / job.channels;
  job.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  job.key = static_cast<uint64_t>(key);
  job.scale = p < 1 ? 1 / (1 - p) : 0.0;
  job.evaluation = static_cast<uint32_t>(evaluation);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const Launch where{static_cast<cudaStream_t>(stream), int64_t{processors} * kBlocksPerProcessor};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch<float>(job, where);
      break;
    case ScalarType::Double:
      launch<double>(job, where);
      break;
    case ScalarType::BFloat16:
      launch<c10::BFloat16>(job, where);
      break;
    case ScalarType::Half:
      launch<c10::Half>(job, where);
      break;
    default:
      STD_TORCH_CHECK(false, "dropout: the native kernel does not take this dtype; use backend='reference'");
  }
  return out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CUDA, m) { m.impl("_dropout_native", TORCH_BOX(&fastens::dropout)); }
