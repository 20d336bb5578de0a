// K members of one shape and the memory of a result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "check.h"
#include "flat.h"
#include "isa/choice.h"
#include "kernels/aggregate/kernels.h"

namespace fastens {

// K members and a result in one flat layout; a member in another layout is copied into it.
struct MemberTensors {
  Tensor out;                     // [B, ...], not yet written
  std::vector<Tensor> own;        // keeps copies alive
  std::vector<const char*> data;  // [K]
  ScalarType dtype;
  int64_t count, batch, element_size;

  MemberTensors(const std::vector<Tensor>& scores, const char* op)
      : out(result_like(scores, op)),
        dtype(out.scalar_type()),
        count(out.numel()),
        batch(out.size(0)),
        element_size(static_cast<int64_t>(out.element_size())) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half,
                    op, ": `scores` has a dtype that the native kernel does not take; use backend='reference'");
    ask_for_huge_pages(out);
    for (const Tensor& score : scores) {
      own.push_back(score);
      if (!same_strides(score, out)) {
        own.back() = torch::stable::empty_like(out);
        torch::stable::copy_(own.back(), score);
      }
      data.push_back(static_cast<const char*>(own.back().data_ptr()));
    }
  }

  int64_t num_members() const { return static_cast<int64_t>(data.size()); }

  aggregation::Members memory() const {
    using aggregation::Element;
    const Element element = dtype == ScalarType::Float    ? Element::kFloat
                            : dtype == ScalarType::Double ? Element::kDouble
                            : dtype == ScalarType::Half   ? Element::kHalf
                                                          : Element::kBFloat16;
    return {data.data(), num_members(), static_cast<char*>(out.data_ptr()), element};
  }

 private:
  static Tensor result_like(const std::vector<Tensor>& scores, const char* op) {
    check_members(scores, op);
    const Tensor& first = scores[0];
    return is_flat(first) ? torch::stable::empty_like(first) : torch::stable::new_empty(first, first.sizes());
  }
};

// Calls one of the chosen kernels on shares of the elements.
inline void for_elements(const MemberTensors& members, const aggregation::Job& job, const aggregation::Ranges& ranges) {
  const aggregation::Range range = members.dtype == ScalarType::Double ? ranges.of_doubles : ranges.of_floats;
  torch::stable::parallel_for(0, members.count, aggregation::kGrain,
                              [&](int64_t begin, int64_t end) { range(job, begin, end); });
}

}  // namespace fastens
