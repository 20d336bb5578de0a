// The kernels for each instruction set, and the choice among them on the machine that runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "scratch.h"

namespace fastens::program::baseline {
#include "kernels.h"
}  // namespace fastens::program::baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTENS_X86_TARGETS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace fastens::program::avx2 {
#include "kernels.h"
}  // namespace fastens::program::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace fastens::program::avx512 {
#include "kernels.h"
}  // namespace fastens::program::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define FASTENS_BFLOAT16
namespace fastens::program::avx512_bfloat16 {
#include "kernels.h"
}  // namespace fastens::program::avx512_bfloat16
#undef FASTENS_BFLOAT16
#pragma GCC pop_options
#endif

namespace fastens::program {

// The kernel of each kind of step, by Kind.
inline const baseline::Run* kernels() {
#ifdef FASTENS_X86_TARGETS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) return avx512_bfloat16::kRuns;
    return avx512::kRuns;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kRuns;
#endif
  return baseline::kRuns;
}

}  // namespace fastens::program
