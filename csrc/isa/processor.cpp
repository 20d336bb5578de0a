#include "processor.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastens::isa {
namespace {

#if defined(__x86_64__)
enum Register { kEax, kEbx, kEcx };

// Where cpuid says it, and which registers the operating system must keep: bits of XCR0.
struct Feature {
  std::string_view name;
  uint32_t leaf, subleaf;
  Register in;
  int bit;
  uint64_t kept;
};

constexpr uint64_t kAvx = 0x6, kAvx512 = 0xE6;
constexpr Feature kFeatures[] = {
    {"sse4.2", 1, 0, kEcx, 20, 0},
    {"popcnt", 1, 0, kEcx, 23, 0},
    {"movbe", 1, 0, kEcx, 22, 0},
    {"fma", 1, 0, kEcx, 12, kAvx},
    {"f16c", 1, 0, kEcx, 29, kAvx},
    {"avx", 1, 0, kEcx, 28, kAvx},
    {"lzcnt", 0x80000001, 0, kEcx, 5, 0},
    {"bmi1", 7, 0, kEbx, 3, 0},
    {"bmi2", 7, 0, kEbx, 8, 0},
    {"avx2", 7, 0, kEbx, 5, kAvx},
    {"avx512f", 7, 0, kEbx, 16, kAvx512},
    {"avx512dq", 7, 0, kEbx, 17, kAvx512},
    {"avx512cd", 7, 0, kEbx, 28, kAvx512},
    {"avx512bw", 7, 0, kEbx, 30, kAvx512},
    {"avx512vl", 7, 0, kEbx, 31, kAvx512},
    {"avx512bf16", 7, 1, kEax, 5, kAvx512},
};

uint64_t kept_registers() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;  // no xgetbv
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}
#endif

}  // namespace

bool processor_has([[maybe_unused]] std::string_view feature) {
#if defined(__x86_64__)
  for (const Feature& known : kFeatures) {
    if (known.name != feature) continue;
    uint32_t found[4] = {};
    if (!__get_cpuid_count(known.leaf, known.subleaf, &found[0], &found[1], &found[2], &found[3])) return false;
    return (found[known.in] >> known.bit & 1) && (kept_registers() & known.kept) == known.kept;
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (feature == "asimd") return getauxval(AT_HWCAP) >> 1 & 1;
#elif defined(__aarch64__)
  if (feature == "asimd") return true;
#endif
  return false;
}

}  // namespace fastens::isa
