// K members of one shape as flat memory, taken in blocks that stay in the first-level cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/half.h"

namespace fastens::aggregation {

constexpr int64_t kBlock = 512;               // elements of one member at a time
constexpr int64_t kGrain = int64_t{1} << 15;  // elements that are worth a thread of their own

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

struct Members {
  const char* const* data;  // [K]
  int64_t num_members;
  char* out;
  Element element;
};

// Member k's n elements from `at`: themselves, or half and bfloat16 widened into the buffer.
FASTENS_INLINE const float* widened(const Members& members, int64_t k, int64_t at, int64_t n, float* buffer) {
  if (members.element == Element::kFloat) return reinterpret_cast<const float*>(members.data[k]) + at;
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(members.data[k]) + at;
  if (members.element == Element::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = float_of_bfloat16(bits[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = float_of_half(bits[i]);
  }
  return buffer;
}

FASTENS_INLINE const double* widened(const Members& members, int64_t k, int64_t at, int64_t, double*) {
  return reinterpret_cast<const double*>(members.data[k]) + at;
}

// Writes n elements of the result from `at`, rounded to its dtype.
FASTENS_INLINE void narrowed(const float* values, const Members& members, int64_t at, int64_t n) {
  if (members.element == Element::kFloat) {
    std::memcpy(reinterpret_cast<float*>(members.out) + at, values, n * sizeof(float));
    return;
  }
  uint16_t* bits = reinterpret_cast<uint16_t*>(members.out) + at;
  if (members.element == Element::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) bits[i] = bfloat16_of(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) bits[i] = half_of(values[i]);
  }
}

FASTENS_INLINE void narrowed(const double* values, const Members& members, int64_t at, int64_t n) {
  std::memcpy(reinterpret_cast<double*>(members.out) + at, values, n * sizeof(double));
}

}  // namespace fastens::aggregation
