#include "kernels/forest/layout.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastens::forest {
namespace {

// Throws unless the arrays describe trees whose walks end inside them: files may come from strangers.
void check(const Trees& trees) {
  const auto fail = [](const std::string& what) { throw std::invalid_argument("forest: " + what); };
  if (trees.num_trees < 1 || trees.num_features < 1 || trees.num_outputs < 1) {
    fail("expected at least one tree, one feature and one output");
  }
  if (trees.offsets[0] != 0 || trees.offsets[trees.num_trees] != trees.num_nodes) fail("offsets do not span the nodes");
  int64_t leaves = 0;
  for (int64_t t = 0; t < trees.num_trees; ++t) {
    const int64_t begin = trees.offsets[t], size = trees.offsets[t + 1] - begin;
    if (size < 1 || trees.offsets[t + 1] > trees.num_nodes || size > std::numeric_limits<int32_t>::max()) {
      fail("tree " + std::to_string(t) + " has " + std::to_string(size) + " nodes");
    }
    for (int64_t i = 0; i < size; ++i) {
      const int64_t node = begin + i;
      if (trees.feature[node] < 0) {
        ++leaves;
        continue;
      }
      const int32_t left = trees.left[node], right = trees.right[node];
      if (trees.feature[node] >= trees.num_features || std::isnan(trees.threshold[node]) || left <= i || left >= size ||
          right <= i || right >= size) {
        fail("node " + std::to_string(i) + " of tree " + std::to_string(t) +
             " has a feature, threshold or child out of range");
      }
    }
  }
  if (leaves != trees.num_leaves) fail("expected one row of values per leaf");
}

int64_t padded_outputs(int64_t outputs) { return outputs <= 2 ? outputs : outputs <= 4 ? 4 : (outputs + 7) / 8 * 8; }

std::vector<int32_t> depths(const Trees& trees) {
  std::vector<int32_t> depth(trees.num_trees, 0), of(trees.num_nodes, 0);
  for (int64_t t = 0; t < trees.num_trees; ++t) {
    const int64_t begin = trees.offsets[t];
    for (int64_t i = begin; i < trees.offsets[t + 1]; ++i) {
      if (trees.feature[i] < 0) continue;
      for (int64_t child : {begin + trees.left[i], begin + trees.right[i]}) of[child] = std::max(of[child], of[i] + 1);
      depth[t] = std::max(depth[t], of[i] + 1);
    }
  }
  return depth;
}

}  // namespace

Layout::Layout(const Trees& trees, bool double_inputs)
    : num_trees(trees.num_trees),
      num_features(trees.num_features),
      num_outputs(trees.num_outputs),
      num_nodes(trees.num_nodes),
      double_inputs(double_inputs),
      root(trees.offsets, trees.offsets + trees.num_trees),
      stride(padded_outputs(trees.num_outputs)) {
  check(trees);
  depth = depths(trees);
  mux_features = static_cast<int>(num_features);
  if (num_features > 8) mux_features = static_cast<int>((num_features + 3) / 4 * 4);
  if (num_features > 16) mux_features = static_cast<int>((num_features + 15) / 16 * 16);
  make_cuts(trees);
  buckets.push_back(0);  // a gather reads four bytes
  if (wide_codes) {
    make_nodes(trees, wide_nodes);
  } else {
    make_nodes(trees, nodes);
    make_top();
  }
  make_leaves(trees);
  rank_of_ = {};
  place_ = {};
}

void Layout::make_cuts(const Trees& trees) {
  std::vector<std::vector<double>> of(num_features);
  for (int64_t i = 0; i < num_nodes; ++i) {
    if (trees.feature[i] >= 0) of[trees.feature[i]].push_back(trees.threshold[i]);
  }
  int64_t most = 0;
  for (std::vector<double>& values : of) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    Cuts feature{};
    feature.begin = static_cast<int64_t>(double_inputs ? double_cuts.size() : cuts.size());
    feature.count = static_cast<int64_t>(values.size());
    feature.steps = std::bit_width(values.size());
    most = std::max(most, feature.count);
    if (double_inputs) {
      double_cuts.insert(double_cuts.end(), values.begin(), values.end());
      double_cuts.push_back(std::numeric_limits<double>::infinity());
    } else {
      cuts.insert(cuts.end(), values.begin(), values.end());
      cuts.push_back(std::numeric_limits<float>::infinity());
      make_buckets(feature);
    }
    cuts_of.push_back(feature);
  }
  rank_of_.resize(num_nodes);
  for (int64_t i = 0; i < num_nodes; ++i) {
    if (trees.feature[i] < 0) continue;
    const std::vector<double>& values = of[trees.feature[i]];
    rank_of_[i] = std::lower_bound(values.begin(), values.end(), trees.threshold[i]) - values.begin();
  }
  wide_codes = most >= 0xFFFE || num_features >= 0x7FFF;
  feature_bits = std::bit_width(static_cast<uint64_t>(num_features - 1));
  packed_codes = feature_bits < 16 && most < (1 << (16 - feature_bits)) - 1;
  if (!packed_codes) feature_bits = 0;
}

// Equal buckets over the range of the thresholds: a value's bucket says where its rank begins. The same rounded
// arithmetic places thresholds and values, so an earlier bucket holds smaller thresholds only.
void Layout::make_buckets(Cuts& feature) {
  constexpr int64_t kMostInBucket = 12, kMostBuckets = 1 << 13;
  const float *begin = cuts.data() + feature.begin, *end = begin + feature.count;
  feature.first_bucket = static_cast<int64_t>(buckets.size());
  if (feature.count < 2 || feature.count > 0xFFFF) return;
  const int64_t size = std::min<int64_t>(kMostBuckets, std::bit_ceil(static_cast<uint64_t>(2 * feature.count)));
  const float low = begin[0], scale = static_cast<float>(size - 2) / (end[-1] - low);
  if (!std::isfinite(scale) || !std::isfinite(low) || scale <= 0) return;
  std::vector<uint32_t> start(size + 1, 0);
  for (const float* cut = begin; cut < end; ++cut) {
    const int64_t bucket = std::min<int64_t>(static_cast<int64_t>((*cut - low) * scale), size - 1);
    ++start[bucket + 1];
  }
  if (*std::max_element(start.begin(), start.end()) > kMostInBucket) return;
  std::partial_sum(start.begin(), start.end(), start.begin());
  start.pop_back();
  buckets.insert(buckets.end(), start.begin(), start.end());
  feature.num_buckets = static_cast<int32_t>(size);
  feature.low = low;
  feature.scale = scale;
}

// Breadth-first, so that siblings are neighbours and the top of a tree shares cache lines.
template <class Code>
void Layout::make_nodes(const Trees& trees, Aligned<Node<Code>>& packed) {
  packed.resize(num_nodes);
  constexpr uint32_t kNowhere = ~uint32_t{0};
  place_.assign(num_nodes, kNowhere);
  std::vector<int32_t> queue;
  for (int64_t t = 0; t < num_trees; ++t) {
    const int64_t begin = root[t];
    queue.assign(1, 0);
    for (size_t at = 0; at < queue.size(); ++at) {
      const int64_t node = begin + queue[at];
      if (place_[node] != kNowhere) {
        throw std::invalid_argument("forest: a node of tree " + std::to_string(t) + " has two parents");
      }
      place_[node] = static_cast<uint32_t>(at);
      if (trees.feature[node] < 0) {
        packed[begin + at] = {static_cast<uint32_t>(at), Node<Code>::kMissing, Node<Code>::kDefaultLeft};
        continue;
      }
      const Code feature = static_cast<Code>(trees.feature[node]);
      const Code code = static_cast<Code>(packed_codes ? rank_of_[node] << feature_bits | feature : rank_of_[node]);
      const Code missing = trees.default_left[node] ? Node<Code>::kDefaultLeft : Code{0};
      packed[begin + at] = {static_cast<uint32_t>(queue.size()), code, static_cast<Code>(feature | missing)};
      queue.push_back(trees.left[node]);
      queue.push_back(trees.right[node]);
    }
    if (static_cast<int64_t>(queue.size()) != trees.offsets[t + 1] - begin) {
      throw std::invalid_argument("forest: tree " + std::to_string(t) + " has nodes that no path reaches");
    }
  }
}

void Layout::make_top() {
  if (num_features > kMaxMuxFeatures) return;
  const int deepest = std::max(1, *std::max_element(depth.begin(), depth.end()));
  whole = deepest <= kTopLevels && num_trees * (int64_t{1} << deepest) <= std::max<int64_t>(2 * num_nodes, 1 << 15);
  top = whole ? deepest : std::min(deepest, kTopLevels - 1);
  top_size = int64_t{1} << top;
  top_code.assign(num_trees * 256, static_cast<uint16_t>(0xFFFF << feature_bits));
  if (!packed_codes) top_feature.assign(num_trees * 256, 0);
  entry.assign(num_trees * top_size, 0);
  std::vector<std::pair<uint32_t, int64_t>> stack;  // place of a node, heap index
  for (int64_t t = 0; t < num_trees; ++t) {
    stack.assign(1, {0, 1});
    while (!stack.empty()) {
      const auto [place, heap] = stack.back();
      stack.pop_back();
      const Node<uint16_t>& node = nodes[root[t] + place];
      if (heap >= top_size) {
        entry[t * top_size + heap - top_size] = place;
        continue;
      }
      if (node.left == place) {  // a leaf above the last level: every row goes left from here
        stack.push_back({place, 2 * heap});
        continue;
      }
      top_code[t * 256 + heap] = node.code;
      if (!packed_codes) top_feature[t * 256 + heap] = node.feature & ~Node<uint16_t>::kDefaultLeft;
      stack.push_back({node.left, 2 * heap});
      stack.push_back({node.left + 1, 2 * heap + 1});
    }
  }
}

void Layout::make_leaves(const Trees& trees) {
  leaf_of.assign(num_nodes, 0);
  leaf_begin.assign(num_trees + 1, 0);
  std::vector<int64_t> node_of;  // [leaf_rows] node of each row, -1 for a place that no row reaches
  std::vector<int64_t> value_row(num_nodes, -1);
  for (int64_t i = 0, next = 0; i < num_nodes; ++i) {
    if (trees.feature[i] < 0) value_row[i] = next++;
  }
  for (int64_t t = 0; t < num_trees; ++t) {
    std::vector<int64_t> node_at(trees.offsets[t + 1] - root[t]);
    for (int64_t i = root[t]; i < trees.offsets[t + 1]; ++i) node_at[place_[i]] = i;
    const auto add = [&](uint32_t place, int64_t row) {
      leaf_of[root[t] + place] = static_cast<uint32_t>(row);
      node_of.push_back(node_at[place]);
    };
    if (whole) {
      std::vector<bool> placed(node_at.size(), false);
      for (int64_t i = 0; i < top_size; ++i) {
        const uint32_t place = entry[t * top_size + i];
        if (trees.feature[node_at[place]] < 0 && !placed[place]) {
          placed[place] = true;
          add(place, i);
        } else {
          node_of.push_back(-1);
        }
      }
    } else {
      int64_t row = 0;
      for (size_t place = 0; place < node_at.size(); ++place) {
        if (trees.feature[node_at[place]] < 0) add(static_cast<uint32_t>(place), row++);
      }
    }
    leaf_begin[t + 1] = static_cast<int64_t>(node_of.size());
  }
  leaves.assign(node_of.size() * stride, 0.0);
  leaf_low.assign(node_of.size(), 0.0);
  for (size_t row = 0; row < node_of.size(); ++row) {
    if (node_of[row] < 0) continue;
    const double* values = trees.values + value_row[node_of[row]] * num_outputs;
    std::copy_n(values, num_outputs, leaves.data() + row * stride);
    leaf_low[row] = *std::min_element(values, values + num_outputs);
  }
}

bool Layout::has_opposite_leaves() const {
  const int known = opposite_.load(std::memory_order_relaxed);
  if (known >= 0) return known;
  bool found = false;
  std::vector<double> values(leaf_begin.back());
  for (int64_t p = 0; p < num_outputs && !found; ++p) {
    for (size_t row = 0; row < values.size(); ++row) values[row] = leaves[row * stride + p];
    std::sort(values.begin(), values.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
    for (size_t i = 1; i < values.size(); ++i) found |= values[i] == -values[i - 1] && values[i] != 0;
  }
  opposite_.store(found, std::memory_order_relaxed);
  return found;
}

const LeafRanks& Layout::leaf_ranks() const {
  if (const LeafRanks* const known = ranks_.load(std::memory_order_acquire)) return *known;
  auto ranks = std::make_unique<LeafRanks>();
  const int64_t rows = leaf_begin.back();
  ranks->stride = num_outputs <= 2 ? num_outputs : num_outputs <= 4 ? 4 : (num_outputs + 7) / 8 * 8;
  ranks->wide.assign(rows * ranks->stride, 0);
  size_t most = 0;
  std::vector<double> values(rows);
  for (int64_t p = 0; p < num_outputs; ++p) {
    for (int64_t row = 0; row < rows; ++row) values[row] = leaves[row * stride + p];
    std::sort(values.begin(), values.end());
    const auto end = std::unique(values.begin(), values.end());
    for (int64_t row = 0; row < rows; ++row) {
      const double value = leaves[row * stride + p];
      ranks->wide[row * ranks->stride + p] = std::lower_bound(values.begin(), end, value) - values.begin();
    }
    ranks->begin_of.push_back(static_cast<int64_t>(ranks->sorted.size()));
    ranks->sorted.insert(ranks->sorted.end(), values.begin(), end);
    most = std::max<size_t>(most, end - values.begin());
  }
  ranks->bits = std::max<int>(1, std::bit_width(most - 1));
  if (most < 0xFFFF && num_trees < 0xFFFF) {
    ranks->narrow.assign(ranks->wide.begin(), ranks->wide.end());
    ranks->wide = {};
  }
  const LeafRanks* expected = nullptr;
  if (ranks_.compare_exchange_strong(expected, ranks.get(), std::memory_order_acq_rel)) return *ranks.release();
  return *expected;
}

}  // namespace fastens::forest
