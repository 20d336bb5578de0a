// The kernels for each instruction set, and the choice among them on the machine that runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../philox.h"
#include "scratch.h"

// float32 values of one register: 16 bytes everywhere, and wider ones where they are named
#define FASTENS_REGISTER_LANES 4
namespace fastens::program::baseline {
#include "kernels.h"
}  // namespace fastens::program::baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTENS_X86_TARGETS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // what an intrinsic of AVX-512 leaves open on purpose
#include <immintrin.h>
#pragma GCC diagnostic pop

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FASTENS_AVX2
#undef FASTENS_REGISTER_LANES
#define FASTENS_REGISTER_LANES 8
namespace fastens::program::avx2 {
#include "kernels.h"
}  // namespace fastens::program::avx2
#undef FASTENS_AVX2
#pragma GCC pop_options

#pragma GCC push_options
#define FASTENS_AVX512
#pragma GCC target("arch=x86-64-v4")
#undef FASTENS_REGISTER_LANES
#define FASTENS_REGISTER_LANES 16
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
#undef FASTENS_AVX512
#pragma GCC pop_options
#endif
#undef FASTENS_REGISTER_LANES

namespace fastens::program {

// An instruction set that the kernels were compiled for.
struct Target {
  const char* name;
  const baseline::Run* runs;  // the kernel of each kind of step, by Kind
  bool supported;             // by the machine that runs
  bool bfloat16;              // whether it has products of bfloat16
};

// Every target of this build, the best first.
inline const std::vector<Target>& targets() {
#ifdef FASTENS_X86_TARGETS
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  static const std::vector<Target> all{
#ifdef FASTENS_X86_TARGETS
      {"avx512_bf16", avx512_bfloat16::kRuns, has_avx512 && __builtin_cpu_supports("avx512bf16"), true},
      {"avx512", avx512::kRuns, has_avx512, false},
      {"avx2", avx2::kRuns, has_avx2, false},
#endif
      {"baseline", baseline::kRuns, true, false},
  };
  return all;
}

// The target of a name, or the best one that the machine has for an empty name.
inline const Target& find_target(const std::string& name) {
  std::string known;
  for (const Target& target : targets()) {
    if (name.empty() ? target.supported : name == target.name) {
      STD_TORCH_CHECK(target.supported, "FASTENS_CPU_TARGET: this processor has no ", name, "; unset it");
      return target;
    }
    known += std::string(known.empty() ? "" : ", ") + target.name;
  }
  STD_TORCH_CHECK(false, "FASTENS_CPU_TARGET: '", name, "' is no target of this build, which has ", known);
  return targets().back();
}

// The target that steps run on: FASTENS_CPU_TARGET, read once, else the best one, until another is set.
inline std::atomic<const Target*>& chosen_target() {
  static std::atomic<const Target*> chosen{[] {
    const char* const name = std::getenv("FASTENS_CPU_TARGET");
    return &find_target(name ? name : "");
  }()};
  return chosen;
}

}  // namespace fastens::program
