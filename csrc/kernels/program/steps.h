// A program: what a folded network does, as a flat list of steps over memory that was laid out beforehand.
//
// Every step is a row of kStepWidth 64-bit words, a struct of layout.h. All values are float32; only a pointwise step
// reads and writes other dtypes. Activations are channels-last.
#pragma once

#include <cstdint>

#include "isa/inline.h"
#include "layout.h"

namespace fastens::program {

// Slot 0 is the arena, 1 the packed weights, then come the inputs and the outputs of the call.
struct Slots {
  char* const* bases;
  template <class T = float>
  FASTENS_INLINE T* at(Address address) const {
    if (address < 0) return nullptr;
    return reinterpret_cast<T*>(bases[address >> 48] + (address & ((int64_t{1} << 48) - 1)));
  }
};

// Which member's parameters a row takes: rows come in runs of `rows_per_member`, of member 0, 1, ... in turn, or of the
// members that an int64 array gives, one for each run.
FASTENS_INLINE int64_t member_of(const Slots& slots, Address members, int64_t rows_per_member, int64_t row) {
  const int64_t run = row / rows_per_member;
  const int64_t* const given = slots.at<const int64_t>(members);
  return given ? given[run] : run;
}

// The first run of another member after run `begin`, by bisection: given members come in order. Where they do not, it
// is some run after `begin`.
FASTENS_INLINE int64_t end_of_member(const Slots& slots, Address members, int64_t begin, int64_t runs) {
  const int64_t* const given = slots.at<const int64_t>(members);
  int64_t low = begin + 1, high = given ? runs : low;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (given[middle] > given[begin]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <class T>
FASTENS_INLINE const T& as(const int64_t* words) {
  static_assert(sizeof(T) <= kStepWidth * sizeof(int64_t));
  return *reinterpret_cast<const T*>(words);
}

}  // namespace fastens::program
