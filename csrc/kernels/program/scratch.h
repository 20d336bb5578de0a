// Memory of one thread, which grows to the largest step that it has run.
#pragma once

#include <cstdint>

#include "isa/inline.h"
#include "steps.h"

namespace fastens::program {

// Memory that begins at a cache line. What it held is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;

  // Room for so many values and what is read beyond them by whole vectors.
  template <class T = float>
  FASTENS_INLINE T* room(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)) + 2 * kLanes * static_cast<int64_t>(sizeof(float));
    if (bytes > bytes_) grow(bytes);
    return static_cast<T*>(memory_);
  }

 private:
  void grow(int64_t bytes);

  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

struct Scratch {
  Buffer patch, sums, spread, pixels, taps, totals;
};

}  // namespace fastens::program
