// Compiled for x86-64-v3 by fastens/_build.py, for the baseline elsewhere.
#define FASTENS_SET avx2
#ifdef __AVX2__
#define FASTENS_SET_COMPILED
#endif
#include "kernel_set.h"
