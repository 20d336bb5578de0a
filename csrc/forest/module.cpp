// fastens._forest: a packed forest over NumPy arrays, without copies.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "predict.h"

namespace py = pybind11;

namespace fastens::forest {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const T* checked(const Array<T>& array, int64_t size, const char* name) {
  if (array.size() != size) {
    throw std::invalid_argument("forest: `" + std::string(name) + "` has " + std::to_string(array.size()) +
                                " values, expected " + std::to_string(size));
  }
  return array.data();
}

class PackedForest {
 public:
  PackedForest(const Array<int64_t>& offsets, const Array<int32_t>& feature, const Array<double>& threshold,
               const Array<int32_t>& left, const Array<int32_t>& right, const Array<uint8_t>& default_left,
               const Array<double>& values, int64_t num_features, bool double_inputs, bool allow_nan, bool allow_inf)
      : layout_(trees(offsets, feature, threshold, left, right, default_left, values, num_features), double_inputs),
        allow_nan_(allow_nan),
        allow_inf_(allow_inf) {}

  py::array_t<double> predict(const py::array& x, const std::string& rule, const std::string& option,
                              const std::vector<double>& values, int64_t seed, int64_t offset,
                              const std::string& instruction_set) const {
    const Kernels& kernels = kernels_for(instruction_set);
    const Rows rows = rows_of(x);
    const int64_t n = x.shape(0);
    if (rule == "mean" && !values.empty() && static_cast<int64_t>(values.size()) != layout_.num_trees) {
      throw std::invalid_argument("forest: expected one weight per tree");
    }
    py::array_t<double> out({n, layout_.num_outputs});
    double* to = out.mutable_data();
    int seen;
    {
      const py::gil_scoped_release release;
      seen = forest::predict(layout_, kernels, rows, n, {rule, option, values, seed, offset}, to);
    }
    refuse(rows, n, seen);
    return out;
  }

  py::array_t<double> members(const py::array& x, const std::vector<int64_t>& ranges,
                              const std::string& instruction_set) const {
    const Kernels& kernels = kernels_for(instruction_set);
    for (size_t m = 0; m < ranges.size(); ++m) {
      if (ranges[m] < (m ? ranges[m - 1] : 0) || ranges[m] > layout_.num_trees) {
        throw std::invalid_argument("forest: the members' ranges of trees are not in order");
      }
    }
    if (ranges.empty()) throw std::invalid_argument("forest: no members");
    const Rows rows = rows_of(x);
    const int64_t n = x.shape(0);
    py::array_t<double> out({static_cast<int64_t>(ranges.size()) - 1, n, layout_.num_outputs});
    double* to = out.mutable_data();
    int seen;
    {
      const py::gil_scoped_release release;
      seen = predict_members(layout_, kernels, rows, n, ranges, to);
    }
    refuse(rows, n, seen);
    return out;
  }

  py::dict describe() const {
    py::dict result;
    result["codes"] = layout_.wide_codes ? "32-bit" : layout_.packed_codes ? "16-bit with feature" : "16-bit";
    result["top"] = layout_.top;
    result["whole"] = layout_.whole;
    result["instruction_set"] = kernels_for("auto").name;
    return result;
  }

 private:
  static Trees trees(const Array<int64_t>& offsets, const Array<int32_t>& feature, const Array<double>& threshold,
                     const Array<int32_t>& left, const Array<int32_t>& right, const Array<uint8_t>& default_left,
                     const Array<double>& values, int64_t num_features) {
    if (offsets.size() < 2 || values.ndim() != 2) throw std::invalid_argument("forest: no trees or no values");
    const int64_t nodes = feature.size();
    return {offsets.size() - 1,
            num_features,
            values.shape(1),
            nodes,
            values.shape(0),
            offsets.data(),
            feature.data(),
            checked(threshold, nodes, "threshold"),
            checked(left, nodes, "left"),
            checked(right, nodes, "right"),
            checked(default_left, nodes, "default_left"),
            values.data()};
  }

  Rows rows_of(const py::array& x) const {
    if (x.ndim() != 2 || x.shape(1) != layout_.num_features) {
      throw std::invalid_argument("forest: expected rows of " + std::to_string(layout_.num_features) + " features");
    }
    const bool is_double = py::isinstance<py::array_t<double>>(x);
    if (!is_double && !py::isinstance<py::array_t<float>>(x)) {
      throw std::invalid_argument("forest: expected float32 or float64 in native byte order");
    }
    const int64_t size = is_double ? 8 : 4;
    if (x.strides(0) % size || x.strides(1) % size) throw std::invalid_argument("forest: rows are not aligned");
    return {x.data(), is_double, x.strides(0) / size, x.strides(1) / size};
  }

  // Infinities, and NaN where the forest takes none, are errors that name the first of them.
  void refuse(const Rows& rows, int64_t n, int seen) const {
    const bool infinities = (seen & kInfinity) && !allow_inf_, nans = (seen & kNaN) && !allow_nan_;
    if (!infinities && !nans) return;
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t f = 0; f < layout_.num_features; ++f) {
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

  Layout layout_;
  bool allow_nan_, allow_inf_;
};

}  // namespace
}  // namespace fastens::forest

PYBIND11_MODULE(_forest, m) {
  using fastens::forest::PackedForest;
  m.doc() = "Packed random forests: traversal and aggregation in one pass.";
  py::class_<PackedForest>(m, "PackedForest")
      .def(py::init<const py::array_t<int64_t, py::array::c_style>&, const py::array_t<int32_t, py::array::c_style>&,
                    const py::array_t<double, py::array::c_style>&, const py::array_t<int32_t, py::array::c_style>&,
                    const py::array_t<int32_t, py::array::c_style>&, const py::array_t<uint8_t, py::array::c_style>&,
                    const py::array_t<double, py::array::c_style>&, int64_t, bool, bool, bool>())
      .def("predict", &PackedForest::predict)
      .def("members", &PackedForest::members)
      .def("describe", &PackedForest::describe);
}
