// The kernels of one machine behind a pipe, without torch and Python: what tests/isa/on_machines.py asks, also of a
// machine that is emulated. A request is int64 words and bytes, as is the answer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/forest/predict.h"
#include "isa/choice.h"
#include "kernels/aggregate/kernels.h"
#include "kernels/dropout/kernels.h"
#include "kernels/program/kernels.h"
#include "sorting_network.h"

namespace fastens::forest {
int64_t threads_at_most() { return 1; }
}  // namespace fastens::forest

namespace {

void take(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}
template <class T = int64_t>
T word() {
  T value;
  take(&value, sizeof(value));
  return value;
}
void give(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

// Bytes at a cache line, with 64 beyond them that nobody may write.
class Bytes {
 public:
  explicit Bytes(size_t size) : size(size), data(static_cast<char*>(::operator new(size + 64, std::align_val_t{64}))) {
    std::memset(data, 0x5A, size + 64);
  }
  Bytes(Bytes&& other) : size(other.size), data(std::exchange(other.data, nullptr)) {}
  ~Bytes() {
    for (size_t i = 0; data && i < 64; ++i) {
      if (data[size + i] != 0x5A) std::abort();
    }
    ::operator delete(data, std::align_val_t{64});
  }
  static Bytes taken() {
    Bytes bytes(static_cast<size_t>(word()));
    take(bytes.data, bytes.size);
    return bytes;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

  size_t size;
  char* data;
};

void run_program() {
  namespace program = fastens::program;
  const Bytes words = Bytes::taken();
  std::vector<Bytes> slots;
  std::vector<char*> bases;
  for (int64_t n = word(); n > 0; --n) slots.push_back(Bytes::taken());
  for (const Bytes& slot : slots) bases.push_back(slot.data);
  const program::Kernels& kernels = program::kernels_of(fastens::isa::chosen());
  static program::Scratch scratch;
  for (size_t at = 0; at < words.size / 8; at += program::kStepWidth) {
    const int64_t* const step = words.as<int64_t>() + at;
    for (int64_t task = 0; task < step[1]; ++task) kernels.runs[step[0]](step, {bases.data()}, task, scratch);
  }
  for (const Bytes& slot : slots) give(slot.data, slot.size);
}

void aggregate() {
  using namespace fastens::aggregation;
  const Kernels& kernels = kernels_of(fastens::isa::chosen());
  const Ranges ranges[] = {kernels.linear,  kernels.median,    kernels.dominant,
                           kernels.max_abs, kernels.geometric, kernels.variance};
  const int64_t rule = word(), element = word(), num_members = word(), average = word();
  const double scale = word<double>(), eps = word<double>();
  const Bytes weights = Bytes::taken();
  std::vector<Bytes> scores;
  std::vector<const char*> data;
  for (int64_t k = 0; k < num_members; ++k) scores.push_back(Bytes::taken());
  for (const Bytes& score : scores) data.push_back(score.data);
  const Bytes out(scores[0].size);
  const Members members{data.data(), num_members, out.data, static_cast<Element>(element)};
  const bool wide = members.element == Element::kDouble;
  const int64_t count = static_cast<int64_t>(out.size) / (wide ? 8 : members.element == Element::kFloat ? 4 : 2);
  Job job{members, weights.as<double>(), scale, average != 0, 0, 0, eps};
  std::vector<Pair> pairs;
  fastens::sorting_network(static_cast<int>(num_members), [&](int a, int b) { pairs.push_back({a, b}); });
  const Bytes rows(static_cast<size_t>(num_members * kRow * 8));
  job.rows = rows.data;
  job.pairs = pairs.data();
  job.num_pairs = static_cast<int64_t>(pairs.size());
  if (rule == 4) {
    double low = 0;
    (wide ? kernels.lowest_of_doubles : kernels.lowest_of_floats)(members, 0, count, &low);
    job.base = low > 0 ? 0 : low;
    job.shift = low > 0 ? low : 0;
  }
  (wide ? ranges[rule].of_doubles : ranges[rule].of_floats)(job, 0, count);
  give(out.data, out.size);
}

void drop() {
  using namespace fastens::masking;
  const Kernels& kernels = kernels_of(fastens::isa::chosen());
  const Range ranges[] = {kernels.of_floats, kernels.of_doubles, kernels.of_bfloat16, kernels.of_half};
  const int64_t element = word(), activation = word(), rows = word(), count = word(), key = word(), evaluation = word();
  const double p = word<double>();
  const Bytes x = Bytes::taken(), members = Bytes::taken(), samples = Bytes::taken(), out(x.size);
  const Job job{x.data,
                out.data,
                members.as<int64_t>(),
                samples.as<int64_t>(),
                count,
                static_cast<uint64_t>(p * 4294967296.0 + 0.5),
                static_cast<uint64_t>(key),
                1 / (1 - p),
                static_cast<uint32_t>(evaluation),
                static_cast<fastens::Activation>(activation)};
  ranges[element](job, 0, rows);
  give(out.data, out.size);
}

void predict() {
  using namespace fastens::forest;
  const int64_t num_trees = word(), num_features = word(), num_outputs = word(), num_nodes = word();
  const int64_t num_leaves = word(), double_inputs = word(), n = word(), num_values = word();
  const Bytes arrays[] = {Bytes::taken(), Bytes::taken(), Bytes::taken(), Bytes::taken(),
                          Bytes::taken(), Bytes::taken(), Bytes::taken()};
  const Bytes x = Bytes::taken(), name = Bytes::taken(), option = Bytes::taken(), values = Bytes::taken();
  const Trees trees{num_trees,
                    num_features,
                    num_outputs,
                    num_nodes,
                    num_leaves,
                    arrays[0].as<int64_t>(),
                    arrays[1].as<int32_t>(),
                    arrays[2].as<double>(),
                    arrays[3].as<int32_t>(),
                    arrays[4].as<int32_t>(),
                    arrays[5].as<uint8_t>(),
                    arrays[6].as<double>()};
  const Layout layout(trees, double_inputs);
  const Rule rule{{name.data, name.size},
                  {option.data, option.size},
                  {values.as<double>(), values.as<double>() + num_values},
                  7,
                  0};
  const Bytes out(static_cast<size_t>(n * num_outputs * 8));
  predict(layout, kernels_for("auto"), {x.data, true, num_features, 1}, n, rule, out.as<double>());
  give(out.data, out.size);
}

void describe() {
  const std::string text = fastens::isa::described();
  const int64_t size = static_cast<int64_t>(text.size());
  give(&size, sizeof(size));
  give(text.data(), text.size());
}

}  // namespace

int main() {
  void (*const asked[])() = {describe, run_program, aggregate, drop, predict};
  for (;;) {
    asked[word()]();
    std::fflush(stdout);
  }
}
