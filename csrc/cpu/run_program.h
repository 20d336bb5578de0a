// Running steps on the instruction set that was chosen, for the ops of this library.
#pragma once

#include "kernels/program/steps.h"

namespace fastens::program {

// Runs steps one after the other, the tasks of each shared by so many threads.
void run_steps(const int64_t* program, int64_t num_steps, const Slots& slots, int64_t num_threads);

}  // namespace fastens::program
