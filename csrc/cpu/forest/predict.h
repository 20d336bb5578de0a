// Every rule over a packed forest: blocks of rows through traversal and aggregation, on several threads where it pays.
#pragma once

#include <string>
#include <vector>

#include "kernels/forest/kernels.h"

namespace fastens::forest {

// A rule as fastens/rules.py hands it to the dispatcher.
struct Rule {
  std::string name, option;
  std::vector<double> values;
  int64_t seed, offset;
};

// The kernels of a row of isa/levels.h by its name, or of the chosen one for "auto".
// Throws std::runtime_error for a row that this build or the processor has not.
const Kernels& kernels_for(const std::string& instruction_set);

// How many threads may share the work: of the process that has the library.
int64_t threads_at_most();

// Writes [n, num_outputs]; returns what was seen in the rows. A result of rows with infinities is meaningless.
int predict(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, const Rule& rule, double* out);

// Writes [ranges.size() - 1, n, num_outputs]: for each member the sum of trees [ranges[m], ranges[m + 1]).
int predict_members(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n,
                    const std::vector<int64_t>& ranges, double* out);

}  // namespace fastens::forest
