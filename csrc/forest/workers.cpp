#include "workers.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace fastens::forest {
namespace {

struct Job {
  const std::function<void(const std::function<int64_t()>&)>& work;
  int64_t blocks;
  std::atomic<int64_t> next = 0;
  std::mutex failing;
  std::exception_ptr failure;

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
    {
      const std::lock_guard lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread(&Helpers::help, this).detach();
      job_ = &job;
      wanted_ = helpers;
    }
    for (int64_t i = 0; i < helpers; ++i) wake_.notify_one();
    job.run();
    std::unique_lock lock(mutex_);
    job_ = nullptr;  // nobody enters from here on
    left_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  [[noreturn]] void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ && wanted_ > 0; });
      Job* const job = job_;
      --wanted_;
      ++inside_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--inside_ == 0) left_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, left_;
  Job* job_ = nullptr;
  int64_t started_ = 0, wanted_ = 0, inside_ = 0;
};

}  // namespace

void share_blocks(int64_t blocks, int64_t threads, const std::function<void(const std::function<int64_t()>&)>& work) {
  static Helpers* const helpers = new Helpers;  // outlives its threads, which nobody joins
  Job job{work, blocks};
  helpers->run(job, threads - 1);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace fastens::forest
