// The instruction sets that kernels are compiled for: one table, of which fastens/_build.py takes the flags and
// isa/choice.h the choice on the machine that runs.
//
// LEVEL(name, products, flags, features), the best first. Every file of csrc/kernels is compiled once for each row,
// with its flags and with FASTENS_LEVEL as its name. `features` are what the processor must have besides those of the
// rows below. Where `products` is true, a row differs from the next one in products of bfloat16 alone: only kernels
// that multiply them are compiled for it, all others are those of the next row.
#pragma once

#if defined(__x86_64__)
#define FASTENS_LEVELS(LEVEL)                                                                     \
  LEVEL(avx512_bf16, true, "-march=x86-64-v4 -mavx512bf16", "avx512bf16")                         \
  LEVEL(avx512, false, "-march=x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl")         \
  LEVEL(avx2, false, "-march=x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma lzcnt movbe popcnt sse4.2") \
  LEVEL(baseline, false, "", "")
#elif defined(__aarch64__)
#define FASTENS_LEVELS(LEVEL) LEVEL(neon, false, "", "asimd")
#else
#define FASTENS_LEVELS(LEVEL) LEVEL(baseline, false, "", "")
#endif

// Below the struct Kernels of a family, in its namespace: declares `<level>::kKernels` of every level that has its own,
// and defines kernels_of(level), which takes the number of a row. `multiplies`: whether the family multiplies bfloat16.
#define FASTENS_KERNELS_OF_LEVELS(multiplies)                                        \
  FASTENS_LEVELS(FASTENS_DECLARE_KERNELS)                                            \
  template <bool kMultiplies>                                                        \
  const Kernels& kernels_of_row(int level) {                                         \
    static constexpr const Kernels* kAll[] = {FASTENS_LEVELS(FASTENS_NAME_KERNELS)}; \
    return kAll[level] ? *kAll[level] : *kAll[level + 1];                            \
  }                                                                                  \
  inline const Kernels& kernels_of(int level) { return kernels_of_row<multiplies>(level); }
#define FASTENS_DECLARE_KERNELS(level, products, flags, features) \
  namespace level {                                               \
  extern const Kernels kKernels;                                  \
  }
#define FASTENS_NAME_KERNELS(level, products, flags, features) kMultiplies || !products ? &level::kKernels : nullptr,
