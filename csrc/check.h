// Checks and compile-time switches that every kernel of the CPU library shares.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <vector>

// Run-time choice of AVX-512, AVX2 or the baseline for one named function. The loader resolves the clones through
// ifunc, which only ELF with glibc has; everywhere else the function is compiled once, for the baseline. A lambda or a
// template handed to parallel_for would not be cloned: the cloned function calls FASTENS_INLINE templates instead.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && defined(__GLIBC__)
#define FASTENS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTENS_CLONES
#endif

// Inlined into the caller, so that it is compiled for the caller's instruction set.
#if defined(__GNUC__)
#define FASTENS_INLINE inline __attribute__((always_inline))
#else
#define FASTENS_INLINE inline
#endif

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
