// Inlined into the caller, so that it is compiled for the caller's instruction set: a function that is not could be
// kept once for all of them by the linker. No kernel calls another kind of shared function.
#pragma once

#if defined(__CUDACC__)
#define FASTENS_INLINE __forceinline__
#elif defined(__GNUC__)
#define FASTENS_INLINE inline __attribute__((always_inline))
#else
#define FASTENS_INLINE inline
#endif
