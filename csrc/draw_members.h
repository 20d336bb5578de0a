// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTENS_HOST_DEVICE __host__ __device__
#else
#define FASTENS_HOST_DEVICE
#endif

namespace fastens {

// First 32 bits of Philox4x32-10 at counter (index, offset), 64 bits each, under a 64-bit key.
FASTENS_HOST_DEVICE inline uint32_t philox(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t x0 = static_cast<uint32_t>(index);
  uint32_t x1 = static_cast<uint32_t>(index >> 32);
  uint32_t x2 = static_cast<uint32_t>(offset);
  uint32_t x3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x0;
    const uint64_t b = uint64_t{0xCD9E8D57} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return x0;
}

// A member in [0, num_members), 0 < num_members < 2^32: the high half of a 64-bit product, whose bias is at most
// num_members / 2^32.
FASTENS_HOST_DEVICE inline int64_t draw_member(int64_t seed, int64_t offset, int64_t num_members, int64_t sample) {
  const uint64_t bits =
      philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint64_t>(sample));
  return static_cast<int64_t>((bits * static_cast<uint64_t>(num_members)) >> 32);
}

}  // namespace fastens
