// Counter-based dropout and the activation before it, per work item: what the kernel runs, and the tests on the host.
#pragma once

#include "activation.h"
#include "job.h"
#include "philox4x32.h"

namespace fastens {

constexpr int kWords = 4;  // elements that share a call of Philox

// Rows of `channels` times `space` elements; an element's number in its row is channel * space + place.
struct DropJob {
  const void* x = nullptr;
  void* out = nullptr;
  const int64_t* members = nullptr;
  const int64_t* samples = nullptr;  // or null: one mask for all samples and evaluations
  int64_t rows = 0, channels = 1, space = 0;
  bool channels_last = false;
  uint64_t threshold = 0, key = 0;
  double scale = 1;
  uint32_t evaluation = 0;
  Activation activation = Activation::kNone;

  // Four places of one channel each; the last of a channel may be fewer.
  FASTENS_HOST_DEVICE int64_t items_per_channel() const { return (space + kWords - 1) / kWords; }
  FASTENS_HOST_DEVICE int64_t items() const { return rows * channels * items_per_channel(); }
};

FASTENS_DEVICE Words words_of(const DropJob& job, int64_t row, int64_t block) {
  const uint32_t sample = job.samples ? static_cast<uint32_t>(job.samples[row] + 1) : 0;
  return philox4x32(job.key, static_cast<uint32_t>(block), static_cast<uint32_t>(job.members[row]), sample,
                    job.samples ? job.evaluation : 0);
}

template <class T>
FASTENS_DEVICE T dropped(const DropJob& job, T value, uint32_t word) {
  using W = typename Wide<T>::type;
  const W scale = word >= job.threshold ? static_cast<W>(job.scale) : W{0};
  return static_cast<T>(activated(static_cast<W>(value), job.activation) * scale);
}

// Work item i: neighbours are neighbours in memory. Packed: the four are read and written at once.
template <class T, bool kPacked>
FASTENS_DEVICE void drop_at(const DropJob& job, int64_t i) {
  const int64_t per_channel = job.items_per_channel(), per_row = job.channels * per_channel;
  const int64_t row = i / per_row, rest = i % per_row;
  const int64_t channel = job.channels_last ? rest % job.channels : rest / per_channel;
  const int64_t place = (job.channels_last ? rest / job.channels : rest % per_channel) * kWords;
  const int64_t stride = job.channels_last ? job.channels : 1;
  const int64_t at =
      row * job.channels * job.space + (job.channels_last ? channel + place * stride : channel * job.space + place);
  const int64_t element = channel * job.space + place;
  if constexpr (kPacked) {
    const Words words = words_of(job, row, element / kWords);
    const Pack<T, kWords> given = load<T, kWords>(job.x, at);
    Pack<T, kWords> kept;
#pragma unroll
    for (int w = 0; w < kWords; ++w) kept.element[w] = dropped(job, given.element[w], words.word[w]);
    *reinterpret_cast<Pack<T, kWords>*>(static_cast<T*>(job.out) + at) = kept;
  } else {
    const T* x = static_cast<const T*>(job.x) + at;
    T* out = static_cast<T*>(job.out) + at;
    Words words = words_of(job, row, element / kWords);
    for (int w = 0; w < kWords && place + w < job.space; ++w) {
      const int64_t own = element + w;
      if (w > 0 && own % kWords == 0) words = words_of(job, row, own / kWords);
      out[w * stride] = dropped(job, x[w * stride], words.word[own % kWords]);
    }
  }
}

}  // namespace fastens
