// The kernels over members of float16.
#include "launch.h"

namespace fastens {
FASTENS_REDUCE(, c10::Half)
}  // namespace fastens
