// fastens::_draw_members_native: one member per sample from a counter.
#include "draw_members.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace fastens {
namespace {

Tensor draw_members(int64_t seed, int64_t offset, int64_t num_members, int64_t batch) {
  const int64_t sizes[] = {batch};
  Tensor members = torch::stable::empty({sizes, 1}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(members.data_ptr());
  for (int64_t i = 0; i < batch; ++i) out[i] = draw_member(seed, offset, num_members, i);
  return members;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CompositeExplicitAutograd, m) {
  m.impl("_draw_members_native", TORCH_BOX(&fastens::draw_members));
}
