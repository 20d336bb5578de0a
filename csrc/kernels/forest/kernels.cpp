// The kernels of a forest for one instruction set.
#include "kernels.h"

#include "combine.h"
#include "encode.h"
#include "isa/vectors.h"
#include "median.h"
#include "walk.h"

namespace fastens::forest::FASTENS_LEVEL {

#ifdef __AVX2__
constexpr bool kInRegisters = true;
#else
constexpr bool kInRegisters = false;
#endif

#define FASTENS_TEXT_OF(name) #name
#define FASTENS_TEXT(name) FASTENS_TEXT_OF(name)

extern const Kernels kKernels{FASTENS_TEXT(FASTENS_LEVEL), kInRegisters, kWidth, encode, find_leaves, combine, median};

}  // namespace fastens::forest::FASTENS_LEVEL
