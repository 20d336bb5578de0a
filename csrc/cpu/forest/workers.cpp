#include "workers.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

namespace fastens::forest {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kSpin{100};        // that a helper watches for the next call before it sleeps
constexpr std::chrono::microseconds kSuccession{500};  // between calls of which the next is expected soon

bool may_spin() {
  static const bool allowed = [] {
    const char* const given = std::getenv("OMP_WAIT_POLICY");
    std::string policy = given ? given : "";
    std::transform(policy.begin(), policy.end(), policy.begin(), [](unsigned char c) { return std::tolower(c); });
    return policy != "passive" && std::thread::hardware_concurrency() > 1;
  }();
  return allowed;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether `done` came true while spinning was allowed.
template <class Done>
bool spin_until(Done done) {
  if (!may_spin()) return false;
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

struct Job {
  const std::function<void(const std::function<int64_t()>&)>& work;
  int64_t blocks;
  std::atomic<int64_t> next = 0;
  std::mutex failing{};
  std::exception_ptr failure{};

  void run() {
    try {
      work([this] {
        const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
        return block < blocks ? block : -1;
      });
    } catch (...) {
      next = blocks;
      const std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
  }
};

class Helpers {
 public:
  void run(Job& job, int64_t helpers) {
    // Another thread's call has them: this one goes on alone.
    const std::unique_lock owner(owner_, std::try_to_lock);
    if (!owner) return job.run();
    int64_t asleep = 0;
    {
      const std::lock_guard lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread(&Helpers::help, this).detach();
      job_ = &job;
      wanted_ = helpers;
      asleep = helpers - spinning_;
    }
    for (int64_t i = 0; i < asleep; ++i) wake_.notify_one();
    job.run();
    {
      const std::lock_guard lock(mutex_);
      job_ = nullptr;  // nobody enters from here on
      wanted_ = 0;
    }
    spin_until([this] { return inside_ == 0; });
    std::unique_lock lock(mutex_);
    left_.wait(lock, [this] { return inside_ == 0; });
  }

  int64_t spinning() const { return spinning_; }

 private:
  [[noreturn]] void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      while (wanted_ > 0) {
        Job* const job = job_;
        --wanted_;
        ++inside_;
        lock.unlock();
        job->run();
        lock.lock();
        if (--inside_ == 0) left_.notify_one();
        ++spinning_;
        lock.unlock();
        spin_until([this] { return wanted_ > 0; });
        lock.lock();
        --spinning_;
      }
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, left_;
  Job* job_ = nullptr;
  int64_t started_ = 0;
  std::atomic<int64_t> wanted_ = 0, inside_ = 0, spinning_ = 0;  // changed under the mutex
};

std::atomic<Helpers*> made{nullptr};  // outlives its threads, which nobody joins

Helpers& helpers() {
  static const bool ready = [] {
    made = new Helpers;
    // A forked process has none of the threads, and locks as other threads held them: it starts anew.
    pthread_atfork(nullptr, nullptr, [] { made = new Helpers; });
    return true;
  }();
  (void)ready;
  return *made.load(std::memory_order_relaxed);
}

std::atomic<Clock::rep> last_call = Clock::time_point::min().time_since_epoch().count();

}  // namespace

bool helpers_are_near() {
  if (!may_spin()) return false;
  const Clock::time_point last{Clock::duration{last_call.load(std::memory_order_relaxed)}};
  return helpers().spinning() > 0 || Clock::now() < last + kSuccession;
}

void call_has_ended() {
  if (may_spin()) last_call.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

void share_blocks(int64_t blocks, int64_t threads, const std::function<void(const std::function<int64_t()>&)>& work) {
  Job job{.work = work, .blocks = blocks};
  helpers().run(job, threads - 1);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace fastens::forest
