// Dropout: drawing fresh masks by Philox, and applying a mask where no other step does on its way.

// Words of a counter that are mixed together; products of them in full.
#undef FASTENS_MIXED
#if defined(__AVX512F__)
#define FASTENS_MIXED
using Mixed = __m512i;
FASTENS_INLINE Mixed same(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
FASTENS_INLINE Mixed get(const uint32_t* from) { return _mm512_loadu_si512(from); }
FASTENS_INLINE Mixed numbered(uint32_t first, uint32_t apart) {
  return _mm512_add_epi32(
      same(first),
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), same(apart)));
}
FASTENS_INLINE Mixed either(Mixed a, Mixed b, Mixed c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
FASTENS_INLINE void product(Mixed x, Mixed y, Mixed& high, Mixed& low) {
  const Mixed even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
}
FASTENS_INLINE void put(uint32_t* to, Mixed words) { _mm512_storeu_si512(to, words); }
#elif defined(__AVX2__)
#define FASTENS_MIXED
using Mixed = __m256i;
FASTENS_INLINE Mixed same(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
FASTENS_INLINE Mixed get(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
FASTENS_INLINE Mixed numbered(uint32_t first, uint32_t apart) {
  return _mm256_add_epi32(same(first), _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), same(apart)));
}
FASTENS_INLINE Mixed either(Mixed a, Mixed b, Mixed c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
FASTENS_INLINE void product(Mixed x, Mixed y, Mixed& high, Mixed& low) {
  const Mixed even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  low = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
  high = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
}
FASTENS_INLINE void put(uint32_t* to, Mixed words) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words); }
#endif

// Bit i: whether word i is at least the threshold, which is above 0.
FASTENS_INLINE uint16_t at_least(const uint32_t* words, uint64_t threshold) {
  const uint32_t below = static_cast<uint32_t>(threshold - 1);  // so that 2^32 is none
#if defined(__AVX512F__)
  return _mm512_cmpgt_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(below)));
#elif defined(__AVX2__)
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

  // The words of counters first, first + apart, ...
  FASTENS_INLINE void words(uint32_t first, uint32_t apart, uint32_t (&to)[4][kLanes]) const {
#ifdef FASTENS_MIXED
    for (uint32_t lane = 0; lane < kLanes; lane += kTogether) mix(numbered(first + lane * apart, apart), lane, to);
#else
    for (uint32_t i = 0; i < kLanes; ++i) to[0][i] = first + i * apart;
    philox_lanes(key, member, sample, evaluation, to);
#endif
  }

  // The words of any counters, which `to[0]` holds before.
  FASTENS_INLINE void words(uint32_t (&to)[4][kLanes]) const {
#ifdef FASTENS_MIXED
    for (int lane = 0; lane < kLanes; lane += kTogether) mix(get(to[0] + lane), lane, to);
#else
    philox_lanes(key, member, sample, evaluation, to);
#endif
  }

#ifdef FASTENS_MIXED
  static constexpr int kTogether = sizeof(Mixed) / sizeof(uint32_t);

  FASTENS_INLINE void mix(Mixed x0, int64_t lane, uint32_t (&to)[4][kLanes]) const {
    Mixed x1 = same(member), x2 = same(sample), x3 = same(evaluation);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      Mixed high_a, low_a, high_b, low_b;
      product(x0, same(0xD2511F53), high_a, low_a);
      product(x2, same(0xCD9E8D57), high_b, low_b);
      x0 = either(high_b, x1, same(k0)), x1 = low_b;
      x2 = either(high_a, x3, same(k1)), x3 = low_a;
    }
    put(to[0] + lane, x0), put(to[1] + lane, x1), put(to[2] + lane, x2), put(to[3] + lane, x3);
  }
#endif
};

// Channels of a pixel from element e, `step` apart, whose counters and words are any.
FASTENS_INLINE uint16_t drawn(const Stream& stream, int64_t e, int64_t step) {
  uint32_t words[4][kLanes];
  uint16_t of_word[4] = {};
  for (int i = 0; i < kLanes; ++i, e += step) {
    words[0][i] = static_cast<uint32_t>(e / 4);
    of_word[e % 4] |= 1 << i;
  }
  stream.words(words);
  uint16_t bits = 0;
  for (int w = 0; w < 4; ++w) bits |= at_least(words[w], stream.threshold) & of_word[w];
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
        stream.words(static_cast<uint32_t>((p + v * kLanes * step.channel_step) / 4),
                     static_cast<uint32_t>(step.channel_step / 4), words);
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
  const Inlet inlet{step.sources, slots.at(step.table_scale), slots.at(step.table_shift),
                    static_cast<Activation>(step.activation), &step.mask};
  const int64_t row = index / step.splits, split = index % step.splits;
  for (int64_t y = step.height * split / step.splits; y < step.height * (split + 1) / step.splits; ++y) {
    for (int64_t x = 0; x < step.width; ++x) {
      take(inlet, slots, row, y, x, y * step.width + x, const_cast<float*>(pixel(slots, step.out, row, y, x)));
    }
  }
}
