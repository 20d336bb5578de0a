// What the processor that runs can do.
#pragma once

#include <string_view>

namespace fastens::isa {

// Whether the processor, and the operating system for its registers, has a feature that isa/levels.h names.
bool processor_has(std::string_view feature);

}  // namespace fastens::isa
