// The kernels of the instruction set that the including file, kernels_<set>.cpp, is compiled for: it defines
// FASTENS_SET as the set's name, and FASTENS_SET_COMPILED where the compiler's flags allow the set.
#include "kernels.h"

#ifdef FASTENS_SET_COMPILED
#include "combine.h"
#include "encode.h"
#include "median.h"
#include "walk.h"
#endif

#define FASTENS_TEXT_OF(name) #name
#define FASTENS_TEXT(name) FASTENS_TEXT_OF(name)
#define FASTENS_JOIN_OF(a, b) a##b
#define FASTENS_JOIN(a, b) FASTENS_JOIN_OF(a, b)

namespace fastens::forest {

const Kernels* FASTENS_JOIN(kernels_, FASTENS_SET)() {
#ifdef FASTENS_SET_COMPILED
  static constexpr Kernels kKernels{FASTENS_TEXT(FASTENS_SET), kWidth, encode, find_leaves, combine, median};
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace fastens::forest
