// K members of one shape as flat memory, taken in blocks that stay in the first-level cache.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "check.h"

namespace fastens {

constexpr int64_t kBlock = 512;               // elements of one member at a time
constexpr int64_t kGrain = int64_t{1} << 15;  // elements that are worth a thread of their own

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

// K members and a result in one flat layout; a member in another layout is copied into it.
struct Members {
  Tensor out;                     // [B, ...], not yet written
  std::vector<Tensor> own;        // keeps copies alive
  std::vector<const char*> data;  // [K]
  ScalarType dtype;
  int64_t count, batch, element_size;

  Members(const std::vector<Tensor>& scores, const char* op)
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

 private:
  static Tensor result_like(const std::vector<Tensor>& scores, const char* op) {
    check_members(scores, op);
    const Tensor& first = scores[0];
    return is_flat(first) ? torch::stable::empty_like(first) : torch::stable::new_empty(first, first.sizes());
  }
};

// Member k's n elements from `at`: themselves, or half and bfloat16 widened into the buffer.
FASTENS_INLINE const float* widened(const Members& members, int64_t k, int64_t at, int64_t n, float* buffer) {
  if (members.dtype == ScalarType::Float) return reinterpret_cast<const float*>(members.data[k]) + at;
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(members.data[k]) + at;
  if (members.dtype == ScalarType::BFloat16) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = c10::detail::fp16_ieee_to_fp32_value(bits[i]);
  }
  return buffer;
}

FASTENS_INLINE const double* widened(const Members& members, int64_t k, int64_t at, int64_t, double*) {
  return reinterpret_cast<const double*>(members.data[k]) + at;
}

// Writes n elements of the result from `at`, rounded to its dtype.
FASTENS_INLINE void narrowed(const float* values, const Members& members, int64_t at, int64_t n) {
  void* out = members.out.data_ptr();
  if (members.dtype == ScalarType::Float) {
    std::memcpy(static_cast<float*>(out) + at, values, n * sizeof(float));
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(out) + at;
  if (members.dtype == ScalarType::BFloat16) {
    for (int64_t i = 0; i < n; ++i) bits[i] = c10::detail::round_to_nearest_even(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) bits[i] = c10::detail::fp16_ieee_from_fp32_value(values[i]);
  }
}

FASTENS_INLINE void narrowed(const double* values, const Members& members, int64_t at, int64_t n) {
  std::memcpy(static_cast<double*>(members.out.data_ptr()) + at, values, n * sizeof(double));
}

}  // namespace fastens
