// Compiled for x86-64-v3 by fastens/_build.py, for the baseline elsewhere.
#include "kernels.h"

#ifdef __AVX2__
#include "combine.h"
#include "encode.h"
#include "median.h"
#include "walk.h"
#endif

namespace fastens::forest {

const Kernels* kernels_avx2() {
#ifdef __AVX2__
  static constexpr Kernels kKernels{"avx2", kWidth, encode, find_leaves, combine, median};
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace fastens::forest
