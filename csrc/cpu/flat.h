// K members of one shape as flat memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "check.h"

namespace fastens {

// Whether the elements of one sample are contiguous in some order of the other dimensions, samples in order: the flat
// index of an element is then the same in every tensor of these strides.
inline bool is_flat(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<size_t> inner(sizes.size() - 1);
  std::iota(inner.begin(), inner.end(), 1);
  std::sort(inner.begin(), inner.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t d : inner) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return sizes[0] == 1 || strides[0] == expected;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), ours = a.strides(), theirs = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && ours[d] != theirs[d]) return false;
  }
  return true;
}

// Fresh memory of many megabytes costs more in page faults, 4 KiB each, than the kernel that fills it: ask for huge
// pages.
inline void ask_for_huge_pages([[maybe_unused]] const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr()), end = begin + x.numel() * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

}  // namespace fastens
