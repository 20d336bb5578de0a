// What dropout asks of one instruction set.
#pragma once

#include <cstdint>

#include "activation.h"
#include "isa/levels.h"

namespace fastens::masking {

// Rows [R, count] of one dtype.
struct Job {
  const void* x;
  void* out;
  const int64_t* members;
  const int64_t* samples;  // or none: one mask for all samples and evaluations
  int64_t count;           // elements of a row
  uint64_t threshold, key;
  double scale;
  uint32_t evaluation;
  Activation activation;
};

// Rows [begin, end).
using Range = void (*)(const Job&, int64_t begin, int64_t end);

struct Kernels {
  Range of_floats, of_doubles, of_bfloat16, of_half;
};

FASTENS_KERNELS_OF_LEVELS(false)

}  // namespace fastens::masking
