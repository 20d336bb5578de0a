// The kernels over members of float64.
#include "launch.h"

namespace fastens {
FASTENS_REDUCE(, double)
}  // namespace fastens
