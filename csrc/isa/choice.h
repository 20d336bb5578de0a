// The instruction set that kernels run on: a row of isa/levels.h.
#pragma once

#include <string>

namespace fastens::isa {

const char* name_of(int level);
int count();

// The row of a name, or the best one that the processor has for an empty name. Throws std::runtime_error, which
// begins with `asked_by`, for a name that this build or the processor has not.
int find(const std::string& name, const std::string& asked_by);

// The row that kernels run on: that of the environment variable FASTENS_CPU_TARGET, read once, else the best one, until
// another is chosen.
int chosen();
void choose(int level);

// The chosen row, and why it is no better one.
std::string described();

}  // namespace fastens::isa
