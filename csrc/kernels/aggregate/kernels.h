// What the rules and the members' variance ask of one instruction set.
#pragma once

#include "isa/levels.h"
#include "values.h"

namespace fastens::aggregation {

constexpr int kFewFloats = 16, kFewDoubles = 8;  // members that are sorted in registers
constexpr int64_t kRow = 64;

// Members to be put in order.
struct Pair {
  int low, high;
};

struct Job {
  const Members& members;
  const double* weights = nullptr;  // mean, sum: scale * sum_k weights[k] S_k
  double scale = 1;
  bool average = true;                  // median of even K: of the two middle values, or the lower
  double base = 0, shift = 0, eps = 0;  // geometric: exp(mean_k log(((S_k - base) + shift) + eps)) - eps + base - shift
  // The median of more members than these: values [K, kRow] of a thread, sorted by so many comparisons.
  void* rows = nullptr;
  const Pair* pairs = nullptr;
  int64_t num_pairs = 0;
};

// Elements [begin, end).
using Range = void (*)(const Job&, int64_t begin, int64_t end);
// The smallest S_k of [begin, end) over all members; NaN wins and stays.
using Lowest = void (*)(const Members&, int64_t begin, int64_t end, double* lowest);

// Of members in float, bfloat16 or half, and of members in double.
struct Ranges {
  Range of_floats, of_doubles;
};

struct Kernels {
  Ranges linear, median, dominant, max_abs, geometric, variance;
  Lowest lowest_of_floats, lowest_of_doubles;
};

FASTENS_KERNELS_OF_LEVELS(false)

}  // namespace fastens::aggregation
