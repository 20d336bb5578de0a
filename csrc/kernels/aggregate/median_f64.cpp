#include "median.h"

namespace fastens::aggregation::FASTENS_LEVEL {

void median_of_doubles(const Job& job, int64_t begin, int64_t end) {
  median_of_range<double, kFewDoubles>(job, begin, end);
}

}  // namespace fastens::aggregation::FASTENS_LEVEL
