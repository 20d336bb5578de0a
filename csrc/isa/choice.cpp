#include "choice.h"

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "levels.h"
#include "processor.h"

namespace fastens::isa {
namespace {

struct Level {
  const char *name, *features;
};

#define FASTENS_ROW(name, products, flags, features) {#name, features},
constexpr Level kLevels[] = {FASTENS_LEVELS(FASTENS_ROW)};
#undef FASTENS_ROW
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]);

// What a row and those below it ask for and the processor has not, with commas; empty where it has all.
std::string lacking(int level) {
  std::string lacks;
  for (; level < kCount; ++level) {
    std::istringstream features(kLevels[level].features);
    for (std::string feature; features >> feature;) {
      if (!processor_has(feature)) lacks += (lacks.empty() ? "" : ", ") + feature;
    }
  }
  return lacks;
}

int best() {
  for (int level = 0; level + 1 < kCount; ++level) {
    if (lacking(level).empty()) return level;
  }
  return kCount - 1;
}

std::atomic<int>& choice() {
  static std::atomic<int> chosen{[] {
    const char* const name = std::getenv("FASTENS_CPU_TARGET");
    return find(name ? name : "", "FASTENS_CPU_TARGET: ");
  }()};
  return chosen;
}

}  // namespace

const char* name_of(int level) { return kLevels[level].name; }

int count() { return kCount; }

int find(const std::string& name, const std::string& asked_by) {
  if (name.empty()) return best();
  std::string known;
  for (int level = 0; level < kCount; ++level) {
    if (name == kLevels[level].name) {
      const std::string lacks = lacking(level);
      if (lacks.empty()) return level;
      throw std::runtime_error(asked_by + "this processor has no " + name + ", for want of " + lacks + "; unset it");
    }
    known += (known.empty() ? "" : ", ") + std::string(kLevels[level].name);
  }
  throw std::runtime_error(asked_by + "'" + name + "' is no target of this build, which has " + known);
}

int chosen() { return choice().load(std::memory_order_relaxed); }

void choose(int level) { choice() = level; }

std::string described() {
  const int level = chosen(), most = best();
  const std::string name = name_of(level);
  if (level > most) return name + ", as chosen; the best here is " + name_of(most);
  if (level > 0) return name + "; for " + name_of(level - 1) + " the processor lacks " + lacking(level - 1);
  return name + (kCount > 1 ? ", the best of this build" : ", the only one for this architecture");
}

}  // namespace fastens::isa
