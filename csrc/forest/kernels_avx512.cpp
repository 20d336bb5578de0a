// Compiled for x86-64-v4 by fastens/_build.py, for the baseline elsewhere.
#include "kernels.h"

#ifdef __AVX512BW__
#include "combine.h"
#include "encode.h"
#include "median.h"
#include "walk.h"
#endif

namespace fastens::forest {

const Kernels* kernels_avx512() {
#ifdef __AVX512BW__
  static constexpr Kernels kKernels{"avx512", kWidth, encode, find_leaves, combine, median};
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace fastens::forest
