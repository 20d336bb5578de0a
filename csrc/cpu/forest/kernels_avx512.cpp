// Compiled for x86-64-v4 by fastens/_build.py, for the baseline elsewhere.
#define FASTENS_SET avx512
#ifdef __AVX512BW__
#define FASTENS_SET_COMPILED
#endif
#include "kernel_set.h"
