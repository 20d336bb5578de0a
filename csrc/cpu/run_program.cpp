// Runs a program: the steps of a folded network one after the other, the tasks of each step shared by the threads.
#include "run_program.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <thread>

#include "check.h"
#include "isa/choice.h"
#include "kernels/program/kernels.h"

namespace fastens {
namespace {

using namespace program;

// A counter on a cache line of its own.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// The threads pass through the steps side by side. Each first takes the tasks of its own share of a step, then those
// left of the others', and goes on when all are done; so a thread that comes late, or never, delays nobody.
class Execution {
 public:
  Execution(const Kernels& kernels, const int64_t* program, int64_t num_steps, const Slots& slots, int64_t num_threads)
      : runs_(kernels.runs),
        program_(program),
        num_steps_(num_steps),
        slots_(slots),
        num_threads_(num_threads),
        next_(new Counter[num_steps * num_threads]),
        done_(new Counter[num_steps]) {}

  void work(int64_t thread) {
    static thread_local Scratch scratch;
    for (int64_t s = 0; s < num_steps_; ++s) {
      const int64_t* const step = program_ + s * kStepWidth;
      const int64_t tasks = step[1];
      const auto run = runs_[step[0]];
      for (int64_t turn = 0; turn < num_threads_; ++turn) {
        const int64_t share = (thread + turn) % num_threads_;
        const int64_t begin = tasks * share / num_threads_, end = tasks * (share + 1) / num_threads_;
        std::atomic<int64_t>& next = next_[s * num_threads_ + share].value;
        int64_t finished = 0;
        for (int64_t task; (task = begin + next.fetch_add(1, std::memory_order_relaxed)) < end; ++finished) {
          run(step, slots_, task, scratch);
        }
        if (finished) done_[s].value.fetch_add(finished, std::memory_order_release);
      }
      for (int spin = 0; done_[s].value.load(std::memory_order_acquire) < tasks; ++spin) {
        if (spin > 2000) std::this_thread::yield();
      }
    }
  }

 private:
  const Run* runs_;
  const int64_t* program_;
  int64_t num_steps_;
  const Slots& slots_;
  int64_t num_threads_;
  std::unique_ptr<Counter[]> next_, done_;
};

void execute(const Kernels& kernels, const int64_t* program, int64_t num_steps, const Slots& slots,
             int64_t num_threads) {
  Execution execution(kernels, program, num_steps, slots, num_threads);
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) execution.work(thread);
  });
}

void run_program(Tensor program, Tensor weights, Tensor arena, std::vector<Tensor> inputs, std::vector<Tensor> outputs,
                 int64_t num_threads) {
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 2 && program.size(1) == kStepWidth &&
                      program.is_contiguous(),
                  "run_program: `program` is not int64 [steps, ", kStepWidth, "]");
  std::vector<char*> bases;
  for (const Tensor* tensor : {&arena, &weights}) bases.push_back(static_cast<char*>(tensor->data_ptr()));
  for (const Tensor& tensor : inputs) bases.push_back(static_cast<char*>(tensor.data_ptr()));
  for (const Tensor& tensor : outputs) bases.push_back(static_cast<char*>(tensor.data_ptr()));
  const int64_t* const steps = static_cast<const int64_t*>(program.data_ptr());
  const int level = isa::chosen();
  const Kernels& kernels = kernels_of(level);
  for (int64_t s = 0; s < program.size(0); ++s) {
    const int64_t* const step = steps + s * kStepWidth;
    STD_TORCH_CHECK(step[0] > 0 && step[0] < kKinds, "run_program: step ", s, " is of no known kind");
    STD_TORCH_CHECK(kernels.bfloat16 || step[0] != static_cast<int64_t>(Kind::kConv) || !as<Conv>(step).bfloat16,
                    "run_program: step ", s, " multiplies bfloat16, which the target ", isa::name_of(level),
                    " does not");
  }
  execute(kernels, steps, program.size(0), Slots{bases.data()}, num_threads);
}

// Sets the target of a name, where that is not empty; returns the name of what kernels run on.
std::string cpu_target(std::string name) {
  if (!name.empty()) isa::choose(isa::find(name, "FASTENS_CPU_TARGET: "));
  return isa::name_of(isa::chosen());
}

std::string cpu_target_described() { return isa::described(); }

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (int level = 0; level < isa::count(); ++level) names.emplace_back(isa::name_of(level));
  return names;
}

}  // namespace

void program::run_steps(const int64_t* program, int64_t num_steps, const Slots& slots, int64_t num_threads) {
  execute(kernels_of(isa::chosen()), program, num_steps, slots, num_threads);
}

}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_run_program_native", TORCH_BOX(&fastens::run_program)); }
STABLE_TORCH_LIBRARY_IMPL(fastens, CompositeExplicitAutograd, m) {
  m.impl("_cpu_target_native", TORCH_BOX(&fastens::cpu_target));
  m.impl("_cpu_target_described_native", TORCH_BOX(&fastens::cpu_target_described));
  m.impl("_cpu_targets_native", TORCH_BOX(&fastens::cpu_targets));
}
