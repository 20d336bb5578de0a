// What fastens/tabular/packed.py calls by ctypes: a packed forest over NumPy arrays, without copies. By the dispatcher,
// and tensors made of the arrays, a call of one row would take some 3 us more than the 5 that it takes.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "export.h"
#include "predict.h"
#include "python_buffer.h"

namespace fastens::forest {
namespace {

class PackedForest {
 public:
  PackedForest(const Trees& trees, bool double_inputs, bool allow_nan, bool allow_inf)
      : layout(trees, double_inputs), allow_nan_(allow_nan), allow_inf_(allow_inf) {}

  const Layout layout;

  Rows rows_of(const Array& x) const {
    if (x.dimensions() != 2 || x.size(1) != layout.num_features) {
      throw std::invalid_argument("forest: expected rows of " + std::to_string(layout.num_features) + " features");
    }
    const bool is_double = x.holds('d');
    if (!is_double && !x.holds('f')) {
      throw std::invalid_argument("forest: expected float32 or float64 in native byte order");
    }
    const int64_t size = is_double ? 8 : 4;
    if (x.stride(0) % size || x.stride(1) % size) throw std::invalid_argument("forest: rows are not aligned");
    return {x.data(), is_double, x.stride(0) / size, x.stride(1) / size};
  }

  // Infinities and NaN, where the forest takes none, are errors that name the first of them.
  void refuse(const Rows& rows, int64_t n, int seen) const {
    const bool infinities = (seen & kInfinity) && !allow_inf_, nans = (seen & kNaN) && !allow_nan_;
    if (!infinities && !nans) return;
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t f = 0; f < layout.num_features; ++f) {
        const int64_t at = row * rows.row_stride + f * rows.feature_stride;
        const double value = rows.is_double ? static_cast<const double*>(rows.data)[at]
                                            : static_cast<double>(static_cast<const float*>(rows.data)[at]);
        const std::string where = "X[" + std::to_string(row) + ", " + std::to_string(f) + "]";
        if (nans && std::isnan(value)) {
          throw std::invalid_argument(where + " is NaN, but this forest has no missing-value support; impute it first");
        }
        if (infinities && std::isinf(static_cast<float>(value))) {
          throw std::invalid_argument(where + " is infinite or too large for float32");
        }
      }
    }
  }

 private:
  bool allow_nan_, allow_inf_;
};

enum Status { kDone = 0, kRefused = 1, kNoMemory = 2, kRaised = 3 };

thread_local std::string said;  // the last refusal of this thread, or what was asked for

template <class Work>
Status status_of(const Work& work) {
  try {
    work();
    return kDone;
  } catch (const PythonError&) {
    return kRaised;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::exception& error) {
    said = error.what();
    return kRefused;
  }
}

}  // namespace

int64_t threads_at_most() { return torch::stable::get_num_threads(); }

}  // namespace fastens::forest

using namespace fastens::forest;

extern "C" {

// A forest, the kernels that it is asked of, and a rule; kept by the caller.
struct FastensForestCall {
  const void *forest, *kernels;
  const char *rule, *option;
  const double* values;
  int64_t num_values, seed, offset;
};

FASTENS_EXPORT const char* fastens_forest_said() { return said.c_str(); }

// Of seven arrays: offsets [T + 1], feature, threshold, left, right, default_left [N], values [L, p].
FASTENS_EXPORT int fastens_forest_make(void* const* arrays, int64_t num_features, int double_inputs, int allow_nan,
                                       int allow_inf, void** made) {
  return status_of([&] {
    const Array offsets(arrays[0], Array::kRead), feature(arrays[1], Array::kRead), threshold(arrays[2], Array::kRead),
        left(arrays[3], Array::kRead), right(arrays[4], Array::kRead), default_left(arrays[5], Array::kRead),
        values(arrays[6], Array::kRead);
    if (offsets.size(0) < 2 || values.dimensions() != 2) throw std::invalid_argument("forest: no trees or no values");
    const int64_t nodes = feature.size(0);
    const Trees trees{offsets.size(0) - 1,
                      num_features,
                      values.size(1),
                      nodes,
                      values.size(0),
                      offsets.values<int64_t>(offsets.size(0), "offsets"),
                      feature.values<int32_t>(nodes, "feature"),
                      threshold.values<double>(nodes, "threshold"),
                      left.values<int32_t>(nodes, "left"),
                      right.values<int32_t>(nodes, "right"),
                      default_left.values<uint8_t>(nodes, "default_left"),
                      values.values<double>(values.size(0) * values.size(1), "values")};
    *made = new PackedForest(trees, double_inputs, allow_nan, allow_inf);
  });
}

FASTENS_EXPORT void fastens_forest_free(void* forest) { delete static_cast<PackedForest*>(forest); }

// The kernels of an instruction set, see kernels_for.
FASTENS_EXPORT int fastens_forest_kernels(const char* instruction_set, const void** found) {
  return status_of([&] { *found = &kernels_for(instruction_set); });
}

FASTENS_EXPORT int fastens_forest_predict(const FastensForestCall* call, void* x_object, void* out_object) {
  return status_of([&] {
    const PackedForest& forest = *static_cast<const PackedForest*>(call->forest);
    const Array x(x_object, Array::kRead), out(out_object, Array::kWrite);
    const Rows rows = forest.rows_of(x);
    const int64_t n = x.size(0);
    double* const to = out.values<double>(n * forest.layout.num_outputs, "out");
    const Rule rule{
        call->rule, call->option, {call->values, call->values + call->num_values}, call->seed, call->offset};
    if (rule.name == "mean" && call->num_values && call->num_values != forest.layout.num_trees) {
      throw std::invalid_argument("forest: expected one weight per tree");
    }
    int seen;
    {
      const WithoutLock released;
      seen = predict(forest.layout, *static_cast<const Kernels*>(call->kernels), rows, n, rule, to);
    }
    forest.refuse(rows, n, seen);
  });
}

FASTENS_EXPORT int fastens_forest_members(const void* handle, void* x_object, void* out_object, const int64_t* ranges,
                                          int64_t num_members, const void* kernels) {
  return status_of([&] {
    const PackedForest& forest = *static_cast<const PackedForest*>(handle);
    const std::vector<int64_t> bounds(ranges, ranges + num_members + 1);
    for (size_t m = 0; m < bounds.size(); ++m) {
      if (bounds[m] < (m ? bounds[m - 1] : 0) || bounds[m] > forest.layout.num_trees) {
        throw std::invalid_argument("forest: the members' ranges of trees are not in order");
      }
    }
    const Array x(x_object, Array::kRead), out(out_object, Array::kWrite);
    const Rows rows = forest.rows_of(x);
    const int64_t n = x.size(0);
    double* const to = out.values<double>(num_members * n * forest.layout.num_outputs, "out");
    int seen;
    {
      const WithoutLock released;
      seen = predict_members(forest.layout, *static_cast<const Kernels*>(kernels), rows, n, bounds, to);
    }
    forest.refuse(rows, n, seen);
  });
}

// JSON: how the forest is packed, and for which instruction set it would run.
FASTENS_EXPORT int fastens_forest_describe(const void* handle) {
  return status_of([&] {
    const Layout& layout = static_cast<const PackedForest*>(handle)->layout;
    const std::string codes = layout.wide_codes ? "32-bit" : layout.packed_codes ? "16-bit with feature" : "16-bit";
    said = "{\"codes\": \"" + codes + "\", \"top\": " + std::to_string(layout.top) +
           ", \"whole\": " + (layout.whole ? "true" : "false") + ", \"instruction_set\": \"" +
           kernels_for("auto").name + "\"}";
  });
}
}
