// fastens::_member_variance_native: sum_k (S_k - mean)**2 / K of K scores [B, ...], in one pass over the members.
#include <torch/csrc/stable/library.h>

#include "members.h"

namespace fastens {
namespace {

Tensor member_variance(std::vector<Tensor> scores) {
  const MemberTensors tensors(scores, "member_variance");
  const aggregation::Members members = tensors.memory();
  for_elements(tensors, {members}, aggregation::kernels_of(isa::chosen()).variance);
  return tensors.out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_member_variance_native", TORCH_BOX(&fastens::member_variance)); }
