// Checks that the ops of the CPU library share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <vector>

namespace fastens {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `scores` has at least one tensor, all on the CPU, of one shape [B, ...] and one dtype.
inline void check_members(const std::vector<Tensor>& scores, const char* op) {
  STD_TORCH_CHECK(!scores.empty(), op, ": `scores` has no member; expected K >= 1");
  const Tensor& first = scores[0];
  const auto sizes = first.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1, op, ": members of `scores` need a batch dimension [B, ...]");
  for (size_t k = 0; k < scores.size(); ++k) {
    const Tensor& member = scores[k];
    STD_TORCH_CHECK(member.is_cpu(), op, ": `scores[", k, "]` is not on the CPU");
    STD_TORCH_CHECK(member.scalar_type() == first.scalar_type(), op, ": `scores[", k,
                    "]` differs from `scores[0]` in dtype");
    const auto own = member.sizes();
    bool same = own.size() == sizes.size();
    for (size_t d = 0; same && d < sizes.size(); ++d) {
      same = own[d] == sizes[d];
    }
    STD_TORCH_CHECK(same, op, ": `scores[", k, "]` differs from `scores[0]` in shape");
  }
}

}  // namespace fastens
