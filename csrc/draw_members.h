// Counter-based draws of members, from Philox4x32-10.
#pragma once

#include <cstdint>

#include "philox4x32.h"

namespace fastens {

// A member in [0, num_members), 0 < num_members < 2^32: the high half of a 64-bit product, whose bias is at most
// num_members / 2^32.
FASTENS_HOST_DEVICE inline int64_t draw_member(int64_t seed, int64_t offset, int64_t num_members, int64_t sample) {
  // the counter is (sample, offset), 64 bits each; the first word counts
  const uint64_t bits =
      philox4x32(static_cast<uint64_t>(seed), static_cast<uint32_t>(sample),
                 static_cast<uint32_t>(static_cast<uint64_t>(sample) >> 32), static_cast<uint32_t>(offset),
                 static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32))
          .word[0];
  return static_cast<int64_t>((bits * static_cast<uint64_t>(num_members)) >> 32);
}

}  // namespace fastens
