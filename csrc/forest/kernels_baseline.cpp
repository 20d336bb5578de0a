// The kernels for any machine.
#include "combine.h"
#include "encode.h"
#include "median.h"
#include "walk.h"

namespace fastens::forest {

const Kernels* kernels_baseline() {
  static constexpr Kernels kKernels{"baseline", kWidth, encode, find_leaves, combine, median};
  return &kKernels;
}

}  // namespace fastens::forest
