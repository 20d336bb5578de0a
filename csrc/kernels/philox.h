// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for many counters at once.
#pragma once

#include <cstdint>

#include "isa/inline.h"

namespace fastens {

constexpr int kLanes = 16;  // counters that are mixed together, one to a vector lane

// Words [4][kLanes] of the counters (words[0][lane], x1, x2, x3) under a 64-bit key.
FASTENS_INLINE void philox_lanes(uint64_t key, uint32_t x1, uint32_t x2, uint32_t x3, uint32_t (&words)[4][kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    words[1][i] = x1;
    words[2][i] = x2;
    words[3][i] = x3;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t{0xD2511F53} * words[0][i];
      const uint64_t b = uint64_t{0xCD9E8D57} * words[2][i];
      words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ k0;
      words[1][i] = static_cast<uint32_t>(b);
      words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ k1;
      words[3][i] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

}  // namespace fastens
