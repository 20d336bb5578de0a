// fastens::_dropout_native: activation and dropout of rows [R, ...] by counter-based masks; element e of a row of
// member k and sample s is kept where word e % 4 of Philox4x32-10 at counter (e / 4, k, s + 1, evaluation) is at least
// p * 2^32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "check.h"
#include "isa/choice.h"
#include "kernels/dropout/kernels.h"

namespace fastens {
namespace {

// One int64 on the CPU for each of R rows.
const int64_t* numbers_of(const Tensor& numbers, int64_t rows, const char* name) {
  STD_TORCH_CHECK(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Long && numbers.dim() == 1 &&
                      numbers.size(0) == rows && numbers.is_contiguous(),
                  "dropout: `", name, "` must be contiguous int64 on the CPU with one number for each of ", rows,
                  " rows");
  return static_cast<const int64_t*>(numbers.data_ptr());
}

Tensor dropout(const Tensor& given, const Tensor& members, const std::optional<Tensor>& samples, double p, int64_t key,
               int64_t evaluation, std::string activation) {
  STD_TORCH_CHECK(given.is_cpu() && given.dim() >= 1, "dropout: `x` must be rows [R, ...] on the CPU");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout: `p` is ", p, ", expected a probability");
  const Tensor x = torch::stable::contiguous(given);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t rows = x.size(0);
  const masking::Job job{x.data_ptr(),
                         out.data_ptr(),
                         numbers_of(members, rows, "members"),
                         samples ? numbers_of(*samples, rows, "samples") : nullptr,
                         rows ? x.numel() / rows : 0,
                         static_cast<uint64_t>(std::nearbyint(p * 4294967296.0)),
                         static_cast<uint64_t>(key),
                         p < 1 ? 1 / (1 - p) : 0.0,
                         static_cast<uint32_t>(evaluation),
                         activation_of(activation)};
  STD_TORCH_CHECK(job.activation != kUnknownActivation, "dropout: unknown activation '", activation, "'");
  const masking::Kernels& kernels = masking::kernels_of(isa::chosen());
  masking::Range range = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      range = kernels.of_floats;
      break;
    case ScalarType::Double:
      range = kernels.of_doubles;
      break;
    case ScalarType::BFloat16:
      range = kernels.of_bfloat16;
      break;
    case ScalarType::Half:
      range = kernels.of_half;
      break;
    default:
      STD_TORCH_CHECK(false, "dropout: the native kernel does not take this dtype; use backend='reference'");
  }
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, job.count));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { range(job, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_dropout_native", TORCH_BOX(&fastens::dropout)); }
