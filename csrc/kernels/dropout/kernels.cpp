// Activation and dropout of rows for one instruction set.
#include "kernels.h"

#include "isa/vectors.h"
#include "kernels/half.h"
#include "kernels/philox.h"

namespace fastens::masking::FASTENS_LEVEL {
namespace {

// A dtype in memory, and the one that it is computed in.
template <class W>
struct Same {
  using Bits = W;
  using Wide = W;
  FASTENS_INLINE static W wide(W value) { return value; }
  FASTENS_INLINE static W narrow(W value) { return value; }
};
struct BFloat16 {
  using Bits = uint16_t;
  using Wide = float;
  FASTENS_INLINE static float wide(uint16_t bits) { return float_of_bfloat16(bits); }
  FASTENS_INLINE static uint16_t narrow(float value) { return bfloat16_of(value); }
};
struct Half {
  using Bits = uint16_t;
  using Wide = float;
  FASTENS_INLINE static float wide(uint16_t bits) { return float_of_half(bits); }
  FASTENS_INLINE static uint16_t narrow(float value) { return half_of(value); }
};

template <class Dtype>
void drop(const Job& job, int64_t begin, int64_t end) {
  using T = typename Dtype::Bits;
  using W = typename Dtype::Wide;
  uint32_t words[4][kLanes];
  alignas(64) uint32_t bits[4 * kLanes];
  alignas(64) W values[4 * kLanes];
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t member = static_cast<uint32_t>(job.members[row]);
    const uint32_t sample = job.samples ? static_cast<uint32_t>(job.samples[row] + 1) : 0;
    const T* x = static_cast<const T*>(job.x) + row * job.count;
    T* out = static_cast<T*>(job.out) + row * job.count;
    for (int64_t at = 0; at < job.count; at += 4 * kLanes) {
      for (int i = 0; i < kLanes; ++i) words[0][i] = static_cast<uint32_t>(at / 4 + i);
      philox_lanes(job.key, member, sample, job.samples ? job.evaluation : 0, words);
      for (int i = 0; i < kLanes; ++i) {
        for (int w = 0; w < 4; ++w) bits[4 * i + w] = words[w][i];
      }
      const int64_t n = job.count - at < 4 * kLanes ? job.count - at : 4 * kLanes;
      for (int64_t i = 0; i < n; ++i) values[i] = Dtype::wide(x[at + i]);
      if (job.activation != Activation::kNone) {
        for (int64_t i = 0; i < n; ++i) values[i] = activated(values[i], job.activation);
      }
      const W scale = static_cast<W>(job.scale);
      for (int64_t i = 0; i < n; ++i) {
        out[at + i] = Dtype::narrow(values[i] * (bits[i] >= job.threshold ? scale : W{0}));
      }
    }
  }
}

}  // namespace

extern const Kernels kKernels{drop<Same<float>>, drop<Same<double>>, drop<BFloat16>, drop<Half>};

}  // namespace fastens::masking::FASTENS_LEVEL
