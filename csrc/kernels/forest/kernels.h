// What the driver asks of one instruction set.
#pragma once

#include <cstdint>

#include "isa/inline.h"
#include "isa/levels.h"
#include "layout.h"

namespace fastens::forest {

// Rows [n, num_features] of float or double, by strides in elements.
struct Rows {
  const void* data;
  bool is_double;
  int64_t row_stride, feature_stride;
};

// Leaves that will be read next, to be asked for in the meantime, one cache line after the other: a burst would fill
// the core's queue of misses and stop everything else.
struct Ahead {
  const double *at, *end;

  FASTENS_INLINE void fetch() {
    if (at < end) {
      __builtin_prefetch(at, 0, 2);
      at += 8;
    }
  }
};

enum Seen : int { kNothing = 0, kNaN = 1, kInfinity = 2 };

// How the members' leaves become one: the state of a row is `stride` doubles, twice that for kGeometric.
enum class Combine { kSum, kWeightedSum, kDominant, kUntiedDominant, kGeometric, kLowest };

struct Kernels {
  const char* name;
  bool in_registers;  // whether find_leaves takes the top levels of trees from registers
  // Doubles of one register: the state of kGeometric alternates between that many products and as many exponents.
  int64_t width;
  // Writes the codes of rows [first, first + count) in tiles; returns what it saw.
  int (*encode)(const Layout&, const Rows&, int64_t first, int64_t count, void* codes);
  // Writes the leaf rows [last - begin, whole tiles of rows] of trees [begin, last).
  void (*find_leaves)(const Layout&, int64_t begin, int64_t last, const void* codes, int64_t rows, bool missing,
                      Ahead& ahead, uint32_t* leaf);
  // Adds trees [begin, last) to the state of `rows` rows; `extra` is the weights [num_trees] or the shifts [rows, 2].
  void (*combine)(const Layout&, Combine, int64_t begin, int64_t last, const uint32_t* leaf, int64_t leaf_stride,
                  int64_t rows, const double* extra, double eps, Ahead& ahead, double* state);
  // Medians [rows, num_outputs] of all trees' leaves [num_trees, leaf_stride]; `scratch` has median_scratch() bytes.
  void (*median)(const Layout&, const LeafRanks&, const uint32_t* leaf, int64_t leaf_stride, int64_t rows, bool average,
                 void* scratch, double* out);
};

constexpr int64_t kLanes = 32;  // medians side by side

// Lanes of the median's scratch: as many as stay in the first-level cache, whole rows.
FASTENS_INLINE int64_t median_rows(const Layout& layout, int64_t rank_bytes) {
  const int64_t lanes = (int64_t{1} << 15) / (rank_bytes * layout.num_trees);
  const int64_t wanted = lanes < kLanes ? kLanes : lanes > 4 * kLanes ? 4 * kLanes : lanes;
  return wanted < layout.num_outputs ? 1 : wanted / layout.num_outputs;
}
FASTENS_INLINE int64_t median_lanes(const Layout& layout, int64_t rank_bytes) {
  const int64_t lanes = median_rows(layout, rank_bytes) * layout.num_outputs;
  return (lanes + kLanes - 1) / kLanes * kLanes;
}
FASTENS_INLINE int64_t median_scratch(const Layout& layout, const LeafRanks& ranks) {
  const int64_t bytes = ranks.narrow.empty() ? 4 : 2;
  return (layout.num_trees * median_lanes(layout, bytes) + ranks.stride + 4 * kLanes) * bytes;
}

FASTENS_KERNELS_OF_LEVELS(false)

}  // namespace fastens::forest
