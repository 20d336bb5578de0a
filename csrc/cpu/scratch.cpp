#include "kernels/program/scratch.h"

#include <cstring>
#include <new>

namespace fastens::program {

constexpr std::align_val_t kLine{64};

Buffer::~Buffer() { ::operator delete(memory_, kLine); }

void Buffer::grow(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  void* const larger = ::operator new(static_cast<size_t>(bytes), kLine);
  std::memset(larger, 0, static_cast<size_t>(bytes));  // what vectors read beyond the values is a number
  ::operator delete(memory_, kLine);
  memory_ = larger;
  bytes_ = bytes;
}

}  // namespace fastens::program
