// Every rule for one instruction set; the medians, which take longest to compile, are in files of their own.
#include "kernels.h"

#include "geometric.h"
#include "largest.h"
#include "linear.h"
#include "variance.h"

namespace fastens::aggregation::FASTENS_LEVEL {

void median_of_floats(const Job& job, int64_t begin, int64_t end);
void median_of_doubles(const Job& job, int64_t begin, int64_t end);

namespace {

#define FASTENS_RANGES(name, floats, doubles)                                                      \
  void name##_of_floats(const Job& job, int64_t begin, int64_t end) { floats(job, begin, end); }   \
  void name##_of_doubles(const Job& job, int64_t begin, int64_t end) { doubles(job, begin, end); } \
  constexpr Ranges k_##name { name##_of_floats, name##_of_doubles }

FASTENS_RANGES(linear, weighted_sum<float>, weighted_sum<double>);
FASTENS_RANGES(dominant, (largest<float, true>), (largest<double, true>));
FASTENS_RANGES(max_abs, (largest<float, false>), (largest<double, false>));
FASTENS_RANGES(geometric, mean_of_range<float>, mean_of_range<double>);
FASTENS_RANGES(variance, variance_of_range<float>, variance_of_range<double>);

void lowest_of_floats(const Members& members, int64_t begin, int64_t end, double* lowest) {
  smallest<float>(members, begin, end, lowest);
}
void lowest_of_doubles(const Members& members, int64_t begin, int64_t end, double* lowest) {
  smallest<double>(members, begin, end, lowest);
}

}  // namespace

extern const Kernels kKernels{k_linear,         {median_of_floats, median_of_doubles},
                              k_dominant,       k_max_abs,
                              k_geometric,      k_variance,
                              lowest_of_floats, lowest_of_doubles};

}  // namespace fastens::aggregation::FASTENS_LEVEL
