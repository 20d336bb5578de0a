#include "median.h"

namespace fastens {

FASTENS_CLONES void median_f32(const Job& job, int64_t begin, int64_t end) {
  median_of_range<float, 16>(job, begin, end);
}

}  // namespace fastens
