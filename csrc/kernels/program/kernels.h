// What running a program asks of one instruction set.
#pragma once

#include <cstdint>

#include "isa/levels.h"
#include "scratch.h"
#include "steps.h"

namespace fastens::program {

// A task of a step, whose words are given.
using Run = void (*)(const int64_t* step, const Slots&, int64_t task, Scratch&);

struct Kernels {
  Run runs[kKinds];  // by Kind
  bool bfloat16;     // whether it has products of bfloat16
};

FASTENS_KERNELS_OF_LEVELS(true)

}  // namespace fastens::program
