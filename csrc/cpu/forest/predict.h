// Every rule over a packed forest: blocks of rows through traversal and aggregation, on several threads where it pays.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastens::forest {

// A rule as fastens/rules.py hands it to the dispatcher.
struct Rule {
  std::string name, option;
  std::vector<double> values;
  int64_t seed, offset;
};

// The kernels of "avx512", "avx2" or "baseline", or for "auto" of the set that the environment variable
// FASTENS_CPU_TARGET named when it was first asked for, by default the best one that this machine has.
// Throws std::invalid_argument for a set that it has not.
const Kernels& kernels_for(const std::string& instruction_set);

// Writes [n, num_outputs]; returns what was seen in the rows. A result of rows with infinities is meaningless.
int predict(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, const Rule& rule, double* out);

// Writes [ranges.size() - 1, n, num_outputs]: for each member the sum of trees [ranges[m], ranges[m + 1]).
int predict_members(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n,
                    const std::vector<int64_t>& ranges, double* out);

}  // namespace fastens::forest
