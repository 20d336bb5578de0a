// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of one counter.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTENS_HOST_DEVICE __host__ __device__
#else
#define FASTENS_HOST_DEVICE
#endif

namespace fastens {

struct Words {
  uint32_t word[4];
};

// Mixes a counter of four words under a 64-bit key.
FASTENS_HOST_DEVICE inline Words philox4x32(uint64_t key, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
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
  return {{x0, x1, x2, x3}};
}

}  // namespace fastens
