// The kernels over members of float32.
#include "launch.h"

namespace fastens {
FASTENS_REDUCE(, float)
}  // namespace fastens
