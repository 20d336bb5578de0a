// A forest packed for traversal: features become ranks among the forest's own thresholds, so that a comparison of
// integers decides every split exactly as the source library's comparison of floats does.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace fastens::forest {

constexpr int64_t kTile = 32;        // rows whose features lie side by side: one 512-bit register of 16-bit codes
constexpr int kTopLevels = 8;        // levels that the vector kernels take from registers
constexpr int kMaxMuxFeatures = 64;  // features that they select between in registers

// 64-byte aligned memory: a leaf of eight doubles is one cache line and one load.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  template <class U>
  bool operator==(const AlignedAllocator<U>&) const {
    return true;
  }
};
template <class T>
using Aligned = std::vector<T, AlignedAllocator<T>>;

// The trees as importers give them: nodes of all trees in one array, children after their parents. A row goes left
// where x <= threshold. The i-th leaf in node order has row i of `values`.
struct Trees {
  int64_t num_trees, num_features, num_outputs, num_nodes, num_leaves;
  const int64_t* offsets;       // [num_trees + 1] first node of each tree
  const int32_t* feature;       // [num_nodes] -1 for a leaf
  const double* threshold;      // [num_nodes]
  const int32_t* left;          // [num_nodes] within the tree
  const int32_t* right;         // [num_nodes]
  const uint8_t* default_left;  // [num_nodes] where a missing value goes
  const double* values;         // [num_leaves, num_outputs]
};

// A node with 16-bit or 32-bit code: `left + 1` is the right child; a leaf is its own left child and sends every code
// there. The top bit of `feature` says that a missing value goes left.
template <class Code>
struct Node {
  static constexpr Code kMissing = static_cast<Code>(~Code{0});
  static constexpr Code kDefaultLeft = static_cast<Code>(Code{1} << (8 * sizeof(Code) - 1));
  uint32_t left;
  Code code, feature;
};

// Sorted distinct thresholds of one feature, and where to start looking for a value among them.
struct Cuts {
  int64_t begin, count;     // in Layout::cuts; the entry behind the last is +inf
  int64_t first_bucket;     // in Layout::buckets
  int32_t num_buckets = 0;  // 0: the thresholds are too uneven for equal buckets, and are bisected
  int32_t steps = 0;        // of the bisection
  float low = 0, scale = 0;
};

// Leaf values as ranks among the leaves of one output: the median of ranks is the rank of the median.
struct LeafRanks {
  int64_t stride;                 // ranks of a leaf, padded
  int bits;                       // of the largest rank
  Aligned<uint16_t> narrow;       // [leaf_rows, stride] where every rank fits, else
  Aligned<uint32_t> wide;         // the same
  std::vector<double> sorted;     // distinct values of all outputs
  std::vector<int64_t> begin_of;  // [num_outputs] in `sorted`
};

class Layout {
 public:
  // Throws std::invalid_argument where the arrays are no forest.
  Layout(const Trees& trees, bool double_inputs);
  ~Layout() { delete ranks_.load(); }
  Layout(const Layout&) = delete;

  int64_t num_trees, num_features, num_outputs, num_nodes;
  bool double_inputs;    // compare as float64 (LightGBM), otherwise as float32
  bool wide_codes;       // ranks take 32 bits
  int feature_bits = 0;  // a code is rank << feature_bits | feature where that fits 16 bits, else the rank
  bool packed_codes = false;

  std::vector<Cuts> cuts_of;    // [num_features]
  Aligned<float> cuts;          // float32 inputs
  Aligned<double> double_cuts;  // float64 inputs
  Aligned<uint16_t> buckets;

  std::vector<int64_t> root;   // [num_trees] first node of each tree
  std::vector<int32_t> depth;  // [num_trees]
  Aligned<Node<uint16_t>> nodes;
  Aligned<Node<uint32_t>> wide_nodes;
  Aligned<uint32_t> leaf_of;  // [num_nodes] row of the tree's leaves

  int top = 0;           // levels in the top tables, 0: none
  bool whole = false;    // the top tables hold the whole trees, and a tree's leaf row is its place in the last level
  int64_t top_size = 1;  // 2^top
  int mux_features = 0;  // features of a tile, padded
  Aligned<uint16_t> top_code;     // [num_trees, 256] by heap index, root 1
  Aligned<uint16_t> top_feature;  // the same, where codes are not packed
  Aligned<uint32_t> entry;        // [num_trees, 2^top] node below the top

  int64_t stride;                   // doubles of a leaf, padded
  std::vector<int64_t> leaf_begin;  // [num_trees + 1] rows of `leaves`
  Aligned<double> leaves;           // [leaf_rows, stride]
  Aligned<double> leaf_low;         // [leaf_rows] smallest output of a leaf

  const LeafRanks& leaf_ranks() const;  // made on first use
  bool has_opposite_leaves() const;     // of one output, v and -v; found on first use

 private:
  void make_cuts(const Trees& trees);
  void make_buckets(Cuts& feature);
  template <class Code>
  void make_nodes(const Trees& trees, Aligned<Node<Code>>& nodes);
  void make_top();
  void make_leaves(const Trees& trees);

  std::vector<uint32_t> rank_of_;  // [num_nodes] of each split's threshold, in the trees' order
  std::vector<uint32_t> place_;    // [num_nodes] of each node, in `nodes` within its tree
  // Threads that need these at once all make them, and one is kept: a lock would stay locked in a forked process.
  mutable std::atomic<const LeafRanks*> ranks_{nullptr};
  mutable std::atomic<int> opposite_{-1};  // unknown
};

}  // namespace fastens::forest
