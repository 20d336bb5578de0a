// Threads that help with the blocks of one call. The caller takes blocks itself and waits for a helper only where it
// has begun one: a helper that is woken late, or never, on a busy machine or after a fork, costs nothing. After a call
// a helper watches for the next one for a tenth of a millisecond before it sleeps, unless OMP_WAIT_POLICY is passive.
#pragma once

#include <cstdint>
#include <functional>

namespace fastens::forest {

// Calls work(take) on the calling thread and on up to `threads` - 1 helpers; take() hands out 0 .. blocks - 1, then -1.
// Rethrows the first exception.
void share_blocks(int64_t blocks, int64_t threads, const std::function<void(const std::function<int64_t()>&)>& work);

// Whether a helper would begin at once: it watches, or calls follow each other so closely that waking it pays.
bool helpers_are_near();
void call_has_ended();

}  // namespace fastens::forest
