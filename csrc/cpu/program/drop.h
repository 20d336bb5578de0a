// Dropout: drawing fresh masks by Philox, and applying a mask where no other step does on its way.

// Bit i: whether word i is at least the threshold, which is above 0.
FASTENS_INLINE uint16_t at_least(const uint32_t* words, uint64_t threshold) {
  const uint32_t below = static_cast<uint32_t>(threshold - 1);  // so that 2^32 is none
#if defined(FASTENS_AVX512)
  return _mm512_cmpgt_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(below)));
#elif defined(FASTENS_AVX2)
  const __m256i sign = _mm256_set1_epi32(INT32_MIN), most = _mm256_set1_epi32(static_cast<int>(below ^ 0x80000000u));
  int bits = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * half));
    const __m256i kept = _mm256_cmpgt_epi32(_mm256_xor_si256(own, sign), most);
    bits |= _mm256_movemask_ps(_mm256_castsi256_ps(kept)) << 8 * half;
  }
  return static_cast<uint16_t>(bits);
#else
  int bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (words[i] > below) << i;
  return static_cast<uint16_t>(bits);
#endif
}

// Bit 4 i of the result is bit i.
FASTENS_INLINE uint64_t every_fourth(uint64_t bits) {
  bits = (bits | bits << 24) & 0x000000FF000000FF;
  bits = (bits | bits << 12) & 0x000F000F000F000F;
  bits = (bits | bits << 6) & 0x0303030303030303;
  return (bits | bits << 3) & 0x1111111111111111;
}

// What the counters of a row have in common.
struct Stream {
  uint64_t key, threshold;
  uint32_t member, sample, evaluation;

  FASTENS_INLINE void words(uint32_t first, uint32_t apart, uint32_t (&to)[4][kLanes]) const {
    philox_lanes(key, first, apart, member, sample, evaluation, to);
  }
};

// A word of the mask by itself: lane i is element e + i * step.
FASTENS_INLINE uint16_t drawn(const Stream& stream, int64_t e, int64_t step) {
  uint16_t bits = 0;
  for (int i = 0; i < kLanes; ++i, e += step) {
    const Words words = philox4x32(stream.key, static_cast<uint32_t>(e / 4), stream.member, stream.sample, stream.evaluation);
    bits |= (words.word[e % 4] >= stream.threshold) << i;
  }
  return bits;
}

FASTENS_INLINE void run_draw(const Draw& step, const Slots& slots, int64_t index) {
  const int64_t row = index / step.splits, split = index % step.splits;
  const Stream stream{static_cast<uint64_t>(*slots.at<int64_t>(step.key)), static_cast<uint64_t>(step.threshold),
                      static_cast<uint32_t>(member_of(slots, step.members, step.rows_per_member, row)),
                      static_cast<uint32_t>(slots.at<int64_t>(step.samples)[row] + 1),
                      static_cast<uint32_t>(*slots.at<int64_t>(step.evaluation))};
  const int64_t fours = (step.pixels + 3) / 4;
  const int64_t begin = 4 * (fours * split / step.splits);
  const int64_t end = std::min(step.pixels, 4 * (fours * (split + 1) / step.splits));
  uint16_t* const out = slots.at<uint16_t>(step.out) + row * step.out_row;
  const int64_t vectors = (step.channels + kLanes - 1) / kLanes;
  const uint16_t last = static_cast<uint16_t>(0xFFFF >> (vectors * kLanes - step.channels));  // channels of the last
  uint32_t words[4][kLanes];
  if (step.pixel_step == 1 && step.channel_step % 4 == 0) {  // a counter has four pixels of one channel
    for (int64_t p = begin; p < end; p += 4) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t e = p + v * kLanes * step.channel_step;
        stream.words(static_cast<uint32_t>(e / 4), static_cast<uint32_t>(step.channel_step / 4), words);
        const uint16_t exist = v == vectors - 1 ? last : 0xFFFF;
        for (int64_t w = 0; w < std::min<int64_t>(4, end - p); ++w) {
          out[(p + w) * step.out_pixel + v] = at_least(words[w], stream.threshold) & exist;
        }
      }
    }
  } else if (step.channel_step == 1 && (step.pixel_step % 4 == 0 || step.pixels == 1)) {  // four channels of a pixel
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t v = 0; v < vectors; v += 4) {
        stream.words(static_cast<uint32_t>((p * step.pixel_step + v * kLanes) / 4), 1, words);
        uint64_t bits = 0;
        for (int w = 0; w < 4; ++w) bits |= every_fourth(at_least(words[w], stream.threshold)) << w;
        for (int64_t i = 0; i < std::min<int64_t>(4, vectors - v); ++i, bits >>= kLanes) {
          out[p * step.out_pixel + v + i] = static_cast<uint16_t>(bits) & (v + i == vectors - 1 ? last : 0xFFFF);
        }
      }
    }
  } else {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t e = p * step.pixel_step + v * kLanes * step.channel_step;
        const uint16_t exist = v == vectors - 1 ? last : 0xFFFF;
        out[p * step.out_pixel + v] = drawn(stream, e, step.channel_step) & exist;
      }
    }
  }
}

FASTENS_INLINE void run_drop(const Drop& step, const Slots& slots, int64_t index) {
  const Inlet inlet{step.source, slots.at(step.table_scale), slots.at(step.table_shift),
                    static_cast<Activation>(step.activation), &step.mask};
  const int64_t row = index / step.splits, split = index % step.splits;
  for (int64_t y = step.height * split / step.splits; y < step.height * (split + 1) / step.splits; ++y) {
    for (int64_t x = 0; x < step.width; ++x) {
      take(inlet, slots, row, y, x, y * step.width + x, const_cast<float*>(pixel(slots, step.out, row, y, x)));
    }
  }
}
