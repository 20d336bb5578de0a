// The kernels over members of bfloat16.
#include "launch.h"

namespace fastens {
FASTENS_REDUCE(, c10::BFloat16)
}  // namespace fastens
