// fastens::_member_variance_native: sum_k (S_k - mean)**2 / K of K scores [B, ...], in one pass over the members.
#include <torch/csrc/stable/library.h>

#include "blocks.h"

namespace fastens {
namespace {

template <class W>
FASTENS_INLINE void variance(const Members& members, int64_t begin, int64_t end) {
  const int64_t num_members = members.num_members();
  const W divisor = static_cast<W>(num_members);
  alignas(64) W buffer[kBlock], mean[kBlock], out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t i = 0; i < n; ++i) mean[i] = out[i] = 0;
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) mean[i] += score[i];
    }
    for (int64_t i = 0; i < n; ++i) mean[i] /= divisor;
    for (int64_t k = 0; k < num_members; ++k) {
      const W* score = widened(members, k, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) out[i] += (score[i] - mean[i]) * (score[i] - mean[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] /= divisor;
    narrowed(out, members, at, n);
  }
}

FASTENS_CLONES void variance_f32(const Members& members, int64_t begin, int64_t end) {
  variance<float>(members, begin, end);
}
FASTENS_CLONES void variance_f64(const Members& members, int64_t begin, int64_t end) {
  variance<double>(members, begin, end);
}

Tensor member_variance(std::vector<Tensor> scores) {
  const Members members(scores, "member_variance");
  const auto range = members.dtype == ScalarType::Double ? variance_f64 : variance_f32;
  torch::stable::parallel_for(0, members.count, kGrain,
                              [&](int64_t begin, int64_t end) { range(members, begin, end); });
  return members.out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_member_variance_native", TORCH_BOX(&fastens::member_variance)); }
