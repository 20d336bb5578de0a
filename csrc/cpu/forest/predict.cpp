#include "predict.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "draw_members.h"
#include "isa/choice.h"
#include "workers.h"

namespace fastens::forest {
namespace {

constexpr int64_t kTogether = 8;             // trees whose leaves are looked up before they are added
constexpr int64_t kMemory = 192 << 10;       // bytes of a block of rows, which stay in the second-level cache
constexpr int64_t kKept = 1 << 20;           // bytes that a thread keeps between calls
constexpr int64_t kWorthFetching = 128;      // rows that use most of a forest
constexpr int64_t kMostFetched = 256 << 10;  // bytes that are asked for at a time
constexpr int64_t kBlocksOfThread = 2;
constexpr double kSleepingThreadCost = 150e3;  // nanoseconds of work that are worth waking a thread for
constexpr double kNearThreadCost = 30e3;       // the same of a thread that watches for it

// Memory of one thread, kept between calls unless it is large. Not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local Aligned<Line> kept;
    memory_ = bytes > kKept ? &own_ : &kept;
    const size_t lines = (bytes + sizeof(Line) - 1) / sizeof(Line);
    if (memory_->size() < lines) memory_->resize(lines);
    at_ = reinterpret_cast<char*>(memory_->data());
  }

  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return taken;
  }

 private:
  struct Line {
    Line() {}
    char bytes[64];
  };
  Aligned<Line> own_;
  Aligned<Line>* memory_;
  char* at_;
};

// Bytes that a block takes: of each row, and once.
struct Memory {
  int64_t codes, leaf, state, once;

  Memory(const Layout& layout, int64_t trees_together, int64_t state_doubles, int64_t once)
      : codes(layout.mux_features * (layout.wide_codes ? 4 : 2)),
        leaf(4 * trees_together),
        state(8 * state_doubles),
        once(Scratch::rounded(once)) {}

  int64_t of_row() const { return codes + leaf + state; }
  int64_t of_block(int64_t rows) const { return rows * of_row() + once + 3 * 64; }
};

// What one thread needs for a block of rows.
struct Block {
  const Layout& layout;
  const Kernels& kernels;
  Scratch scratch;
  int64_t rows = 0, tiles = 0;
  bool missing = false, warm = false;
  char *codes, *once;
  uint32_t* leaf;
  double* state;

  Block(const Layout& layout, const Kernels& kernels, const Memory& memory, int64_t most)
      : layout(layout),
        kernels(kernels),
        scratch(memory.of_block(most)),
        codes(scratch.take<char>(most * memory.codes)),
        once(scratch.take<char>(memory.once)),
        leaf(scratch.take<uint32_t>(most * memory.leaf / 4)),
        state(scratch.take<double>(most * memory.state / 8)) {}

  int encode(const Rows& from, int64_t first, int64_t count) {
    if (!warm && count >= kWorthFetching) {
      fetch(layout.buckets.data(), static_cast<int64_t>(layout.buckets.size()));
      fetch(layout.cuts.data(), static_cast<int64_t>(layout.cuts.size()));
    }
    rows = count;
    tiles = (count + kTile - 1) / kTile;
    const int seen = kernels.encode(layout, from, first, count, codes);
    missing = seen & kNaN;
    return seen;
  }

  // The cache lines of the leaves of trees [begin, last): a thread's first block finds them in no cache of its own.
  Ahead leaves_of(int64_t begin, int64_t last) const {
    last = std::min(last, layout.num_trees);
    if (warm || rows < kWorthFetching || begin >= last) return {nullptr, nullptr};
    const double* leaves = layout.leaves.data();
    const Ahead ahead{leaves + layout.leaf_begin[begin] * layout.stride,
                      leaves + layout.leaf_begin[last] * layout.stride};
    return 8 * (ahead.end - ahead.at) > kMostFetched ? Ahead{nullptr, nullptr} : ahead;
  }

  template <class T>
  static void fetch(const T* at, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (count > kMostFetched / static_cast<int64_t>(sizeof(T))) return;
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(at + i, 0, 2);
  }

  void fetch_codes_of(int64_t begin, int64_t last) const {
    if (warm || rows < kWorthFetching || layout.top == 0) return;
    for (int64_t i = begin * 256; i < std::min(last, layout.num_trees) * 256; i += 32) {
      __builtin_prefetch(layout.top_code.data() + i, 0, 2);
    }
  }

  void find_leaves(int64_t begin, int64_t last, Ahead& ahead) {
    kernels.find_leaves(layout, begin, last, codes, rows, missing, ahead, leaf);
  }

  void combine(Combine how, int64_t begin, int64_t last, const double* extra = nullptr, double eps = 0) {
    for (int64_t tree = begin; tree < last; tree += kTogether) {
      const int64_t end = std::min(last, tree + kTogether);
      fetch_codes_of(end, end + kTogether);
      Ahead ahead = leaves_of(end, end + kTogether);
      find_leaves(tree, end, ahead);
      kernels.combine(layout, how, tree, end, leaf, tiles * kTile, rows, extra, eps, ahead, state);
    }
  }
};

// Estimated nanoseconds of one row on one thread.
double row_cost(const Layout& layout, const Kernels& kernels, double per_leaf) {
  const bool vector = layout.whole && kernels.in_registers;
  double cost = 0;
  for (int32_t depth : layout.depth) cost += vector ? 0.6 : 1.0 + 0.7 * depth;
  return cost + static_cast<double>(layout.num_trees * layout.stride) * per_leaf +
         5.0 * static_cast<double>(layout.num_features);
}

// Calls visit(block, first, count) for blocks of rows, on as many threads as the work is worth; returns what they saw.
template <class Visit>
int for_blocks(const Layout& layout, const Kernels& kernels, int64_t n, double cost_of_row, const Memory& memory,
               Visit visit) {
  const double cost = cost_of_row * static_cast<double>(n);
  const double of_thread = cost >= 2 * kNearThreadCost && helpers_are_near() ? kNearThreadCost : kSleepingThreadCost;
  const double worth = std::max(1.0, cost / of_thread);
  const int64_t threads = worth < 2 ? 1 : std::min(static_cast<int64_t>(worth), threads_at_most());
  const int64_t most = std::max(kTile, kMemory / memory.of_row());
  // Of several threads each takes some blocks, so that one that comes late takes fewer.
  const int64_t least = threads == 1 ? 1 : kBlocksOfThread * threads;
  const int64_t wanted = std::max((n + most - 1) / most, least);
  const int64_t size = ((n + wanted - 1) / wanted + kTile - 1) / kTile * kTile, blocks = (n + size - 1) / size;
  std::atomic<int> seen = kNothing;
  const auto work = [&](const std::function<int64_t()>& take) {
    int64_t b = take();
    if (b < 0) return;
    Block block(layout, kernels, memory, size);
    for (; b >= 0; b = take()) {
      const int64_t first = b * size, count = std::min(size, n - first);
      seen |= visit(block, first, count);
      block.warm = true;
    }
  };
  if (threads == 1) {
    work([next = int64_t{0}, blocks]() mutable { return next < blocks ? next++ : -1; });
  } else {
    share_blocks(blocks, threads, work);
  }
  if (cost >= 2 * kNearThreadCost) call_has_ended();
  return seen;
}

// Copies the state's rows, without padding, times a factor or divided by a number.
void write_rows(const Layout& layout, const double* state, int64_t rows, double divisor, double* out) {
  for (int64_t row = 0; row < rows; ++row, state += layout.stride, out += layout.num_outputs) {
    for (int64_t p = 0; p < layout.num_outputs; ++p) out[p] = state[p] / divisor;
  }
}

int linear(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, const Rule& rule, double* out) {
  const bool weighted = rule.name == "mean" && !rule.values.empty();
  const double divisor = rule.name == "mean" && !weighted ? static_cast<double>(layout.num_trees) : 1.0;
  return for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.06), Memory(layout, kTogether, layout.stride, 0),
                    [&](Block& block, int64_t first, int64_t count) {
                      const int seen = block.encode(rows, first, count);
                      std::fill_n(block.state, count * layout.stride, 0.0);
                      block.combine(weighted ? Combine::kWeightedSum : Combine::kSum, 0, layout.num_trees,
                                    weighted ? rule.values.data() : nullptr);
                      write_rows(layout, block.state, count, divisor, out + first * layout.num_outputs);
                      return seen;
                    });
}

int dominant(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, bool magnitude, double* out) {
  const Combine how = layout.has_opposite_leaves() ? Combine::kDominant : Combine::kUntiedDominant;
  return for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.06), Memory(layout, kTogether, layout.stride, 0),
                    [&](Block& block, int64_t first, int64_t count) {
                      const int seen = block.encode(rows, first, count);
                      std::fill_n(block.state, count * layout.stride, 0.0);
                      block.combine(how, 0, layout.num_trees);
                      if (magnitude) {
                        for (int64_t i = 0; i < count * layout.stride; ++i) block.state[i] = std::abs(block.state[i]);
                      }
                      write_rows(layout, block.state, count, 1.0, out + first * layout.num_outputs);
                      return seen;
                    });
}

int median(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, bool average, double* out) {
  const LeafRanks& ranks = layout.leaf_ranks();
  return for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.3),
                    Memory(layout, layout.num_trees, 0, median_scratch(layout, ranks)),
                    [&](Block& block, int64_t first, int64_t count) {
                      const int seen = block.encode(rows, first, count);
                      Ahead none{nullptr, nullptr};
                      block.find_leaves(0, layout.num_trees, none);
                      kernels.median(layout, ranks, block.leaf, block.tiles * kTile, count, average, block.once,
                                     out + first * layout.num_outputs);
                      return seen;
                    });
}

// Two passes: the smallest value of each row (or of the batch), then the product of all values above it.
int geometric(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, bool whole_batch, double eps,
              double* out) {
  std::vector<double> shift(2 * n);
  int seen = for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.03), Memory(layout, kTogether, 1, 0),
                        [&](Block& block, int64_t first, int64_t count) {
                          const int seen = block.encode(rows, first, count);
                          std::fill_n(block.state, count, std::numeric_limits<double>::infinity());
                          block.combine(Combine::kLowest, 0, layout.num_trees);
                          for (int64_t row = 0; row < count; ++row) shift[2 * (first + row)] = block.state[row];
                          return seen;
                        });
  if (whole_batch) {
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t row = 0; row < n; ++row) lowest = std::min(lowest, shift[2 * row]);
    for (int64_t row = 0; row < n; ++row) shift[2 * row] = lowest;
  }
  for (int64_t row = 0; row < n; ++row) {
    // m = |min| + eps. For min <= 0 it is -min + eps: adding m to S would lose eps to rounding, so min is taken first.
    const double lowest = shift[2 * row];
    shift[2 * row] = lowest > 0 ? 0 : lowest;
    shift[2 * row + 1] = lowest > 0 ? lowest : 0;
  }
  const double members = static_cast<double>(layout.num_trees);
  seen |= for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.2),
                     Memory(layout, kTogether, 2 * layout.stride, 0), [&](Block& block, int64_t first, int64_t count) {
                       const int seen = block.encode(rows, first, count);
                       const int64_t width = std::min(layout.stride, kernels.width);  // of products, then of exponents
                       for (int64_t i = 0; i < count * 2 * layout.stride; ++i)
                         block.state[i] = i / width % 2 ? 0.0 : 1.0;
                       block.combine(Combine::kGeometric, 0, layout.num_trees, shift.data() + 2 * first, eps);
                       for (int64_t row = 0; row < count; ++row) {
                         const double* own = shift.data() + 2 * (first + row);
                         for (int64_t p = 0; p < layout.num_outputs; ++p) {
                           const double* at = block.state + row * 2 * layout.stride + p / width * 2 * width + p % width;
                           const double exponent = static_cast<double>(std::bit_cast<int64_t>(at[width]));
                           const double mean = std::exp2((std::log2(at[0]) + exponent) / members);
                           out[(first + row) * layout.num_outputs + p] = (mean - eps) + (own[0] - own[1]);
                         }
                       }
                       return seen;
                     });
  return seen;
}

template <class Code>
uint32_t leaf_of_row(const Layout& layout, const Node<Code>* nodes, int64_t tree, const Code* codes, int64_t row) {
  const Code* features = codes + row / kTile * layout.mux_features * kTile + row % kTile;
  const Node<Code>* own = nodes + layout.root[tree];
  uint32_t at = 0;
  while (own[at].left != at) {
    const Code code = features[(own[at].feature & static_cast<Code>(~Node<Code>::kDefaultLeft)) * kTile];
    const bool right =
        code == Node<Code>::kMissing ? !(own[at].feature & Node<Code>::kDefaultLeft) : code > own[at].code;
    at = own[at].left + right;
  }
  return layout.leaf_of[layout.root[tree] + at];
}

// One drawn tree per row.
int alternating(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, const Rule& rule,
                double* out) {
  const double cost = 20.0 + 5.0 * static_cast<double>(layout.num_features);
  return for_blocks(layout, kernels, n, cost, Memory(layout, 1, 1, 0), [&](Block& block, int64_t first, int64_t count) {
    const int seen = block.encode(rows, first, count);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t tree = draw_member(rule.seed, rule.offset, layout.num_trees, first + row);
      const uint32_t leaf =
          layout.wide_codes
              ? leaf_of_row(layout, layout.wide_nodes.data(), tree, reinterpret_cast<uint32_t*>(block.codes), row)
              : leaf_of_row(layout, layout.nodes.data(), tree, reinterpret_cast<uint16_t*>(block.codes), row);
      std::copy_n(layout.leaves.data() + (layout.leaf_begin[tree] + leaf) * layout.stride, layout.num_outputs,
                  out + (first + row) * layout.num_outputs);
    }
    return seen;
  });
}

}  // namespace

const Kernels& kernels_for(const std::string& name) {
  return kernels_of(name == "auto" ? isa::chosen() : isa::find(name, "forest: "));
}

int predict(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n, const Rule& rule, double* out) {
  if (n == 0) return kNothing;
  if (rule.name == "mean" || rule.name == "sum") return linear(layout, kernels, rows, n, rule, out);
  if (rule.name == "dominant") return dominant(layout, kernels, rows, n, false, out);
  if (rule.name == "max_abs") return dominant(layout, kernels, rows, n, true, out);
  if (rule.name == "median") return median(layout, kernels, rows, n, rule.option != "lower", out);
  if (rule.name == "geometric") {
    return geometric(layout, kernels, rows, n, rule.option == "batch", rule.values.at(0), out);
  }
  if (rule.name == "alternating") return alternating(layout, kernels, rows, n, rule, out);
  throw std::invalid_argument("forest: no kernel for the rule '" + rule.name + "'");
}

int predict_members(const Layout& layout, const Kernels& kernels, const Rows& rows, int64_t n,
                    const std::vector<int64_t>& ranges, double* out) {
  if (n == 0) return kNothing;
  return for_blocks(layout, kernels, n, row_cost(layout, kernels, 0.2), Memory(layout, kTogether, layout.stride, 0),
                    [&](Block& block, int64_t first, int64_t count) {
                      const int seen = block.encode(rows, first, count);
                      for (size_t m = 0; m + 1 < ranges.size(); ++m) {
                        std::fill_n(block.state, count * layout.stride, 0.0);
                        block.combine(Combine::kSum, ranges[m], ranges[m + 1]);
                        write_rows(layout, block.state, count, 1.0,
                                   out + (static_cast<int64_t>(m) * n + first) * layout.num_outputs);
                      }
                      return seen;
                    });
}

}  // namespace fastens::forest
