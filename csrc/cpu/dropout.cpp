// fastens::_dropout_native: activation and dropout of rows [R, ...] by counter-based masks; element e of a row of
// member k and sample s is kept where word e % 4 of Philox4x32-10 at counter (e / 4, k, s + 1, evaluation) is at least
// p * 2^32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "activation.h"
#include "check.h"
#include "philox.h"

namespace fastens {
namespace {

struct Job {
  const void* x;
  void* out;
  const int64_t* members;
  const int64_t* samples;  // or none: one mask for all samples and evaluations
  int64_t count;           // elements of a row
  uint64_t threshold, key;
  double scale;
  uint32_t evaluation;
  Activation activation;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
FASTENS_INLINE void drop(const Job& job, int64_t begin, int64_t end) {
  using W = Wide<T>;
  uint32_t words[4][kLanes];
  alignas(64) uint32_t bits[4 * kLanes];
  alignas(64) W values[4 * kLanes];
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t member = static_cast<uint32_t>(job.members[row]);
    const uint32_t sample = job.samples ? static_cast<uint32_t>(job.samples[row] + 1) : 0;
    const T* x = static_cast<const T*>(job.x) + row * job.count;
    T* out = static_cast<T*>(job.out) + row * job.count;
    for (int64_t at = 0; at < job.count; at += 4 * kLanes) {
      for (int i = 0; i < kLanes; ++i) words[0][i] = static_cast<uint32_t>(at / 4 + i);
      philox_lanes(job.key, member, sample, job.samples ? job.evaluation : 0, words);
      for (int i = 0; i < kLanes; ++i) {
        for (int w = 0; w < 4; ++w) bits[4 * i + w] = words[w][i];
      }
      const int64_t n = std::min<int64_t>(4 * kLanes, job.count - at);
      for (int64_t i = 0; i < n; ++i) values[i] = static_cast<W>(x[at + i]);
      if (job.activation != Activation::kNone) {
        for (int64_t i = 0; i < n; ++i) values[i] = activated(values[i], job.activation);
      }
      const W scale = static_cast<W>(job.scale);
      for (int64_t i = 0; i < n; ++i) {
        out[at + i] = static_cast<T>(values[i] * (bits[i] >= job.threshold ? scale : W{0}));
      }
    }
  }
}

FASTENS_CLONES void drop_f32(const Job& job, int64_t begin, int64_t end) { drop<float>(job, begin, end); }
FASTENS_CLONES void drop_f64(const Job& job, int64_t begin, int64_t end) { drop<double>(job, begin, end); }
FASTENS_CLONES void drop_bf16(const Job& job, int64_t begin, int64_t end) { drop<c10::BFloat16>(job, begin, end); }
FASTENS_CLONES void drop_f16(const Job& job, int64_t begin, int64_t end) { drop<c10::Half>(job, begin, end); }

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
  Job job{x.data_ptr(),
          out.data_ptr(),
          numbers_of(members, rows, "members"),
          samples ? numbers_of(*samples, rows, "samples") : nullptr,
          rows ? x.numel() / rows : 0,
          static_cast<uint64_t>(std::nearbyint(p * 4294967296.0)),
          static_cast<uint64_t>(key),
          p < 1 ? 1 / (1 - p) : 0.0,
          static_cast<uint32_t>(evaluation),
          activation_of(activation)};
  STD_TORCH_CHECK(job.activation != Activation::kUnknown, "dropout: unknown activation '", activation, "'");
  void (*range)(const Job&, int64_t, int64_t) = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      range = drop_f32;
      break;
    case ScalarType::Double:
      range = drop_f64;
      break;
    case ScalarType::BFloat16:
      range = drop_bf16;
      break;
    case ScalarType::Half:
      range = drop_f16;
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
