// Memory of one thread, which grows to the largest step that it has run.
#pragma once

#include <cstdint>
#include <vector>

#include "steps.h"

namespace fastens::program {

struct Scratch {
  std::vector<float> patch, sums, spread;
  std::vector<const float*> pixels;
  std::vector<int64_t> taps;

  static float* floats(std::vector<float>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count + 2 * kLanes) memory.resize(count + 2 * kLanes);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
};

}  // namespace fastens::program
