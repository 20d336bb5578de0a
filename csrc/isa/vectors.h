// What the instruction set that a kernel is compiled for has: the width and number of its registers, and intrinsics.
#pragma once

#ifndef FASTENS_LEVEL
#error "kernels are compiled once for each row of isa/levels.h, see fastens/_build.py: FASTENS_LEVEL is the row's name"
#endif

#include "isa/inline.h"

#if defined(__AVX2__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // what an intrinsic of AVX-512 leaves open on purpose
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

// Bytes of a register, and how many there are.
#if defined(__AVX512F__)
#define FASTENS_REGISTER_BYTES 64
#define FASTENS_REGISTERS 32
#elif defined(__AVX2__)
#define FASTENS_REGISTER_BYTES 32
#define FASTENS_REGISTERS 16
#elif defined(__aarch64__)
#define FASTENS_REGISTER_BYTES 16
#define FASTENS_REGISTERS 32
#else
#define FASTENS_REGISTER_BYTES 16
#define FASTENS_REGISTERS 16
#endif
