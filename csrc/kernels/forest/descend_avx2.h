// The top levels of a tree with 256-bit registers: 16 rows at a time. See walk.h, which includes it.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

namespace fastens::forest {
namespace {

constexpr int kMostSelected = 16;  // features: beyond them, selecting takes longer than following nodes

// Of kCount values, the one that each lane's number names: bit b of the number is in bits[b]. value(i) is the i-th.
template <int kCount, class Value>
FASTENS_INLINE __m256i selected(Value value, const __m256i* bits) {
  if constexpr (kCount == 1) {
    return value(0);
  } else {
    constexpr int kBit = 31 - __builtin_clz(kCount - 1), kHalf = 1 << kBit;
    const __m256i low = selected<kHalf>(value, bits);
    const __m256i high = selected<kCount - kHalf>([&](int i) { return value(kHalf + i); }, bits);
    return _mm256_blendv_epi8(low, high, bits[kBit]);
  }
}

FASTENS_INLINE __m256i has_bit(__m256i lanes, int bit) {
  const __m256i one = _mm256_set1_epi16(static_cast<short>(1 << bit));
  return _mm256_cmpeq_epi16(_mm256_and_si256(lanes, one), one);
}

// Entry heap of each lane, of kTables tables of eight entries: a byte shuffle in each, then selection between them.
template <int kTables>
FASTENS_INLINE __m256i lookup(const uint16_t* table, __m256i heap) {
  const __m256i twice = _mm256_slli_epi16(_mm256_and_si256(heap, _mm256_set1_epi16(7)), 1);
  const __m256i bytes = _mm256_or_si256(_mm256_or_si256(twice, _mm256_slli_epi16(twice, 8)), _mm256_set1_epi16(0x100));
  __m256i bits[4] = {};
  for (int b = 0; (1 << b) < kTables; ++b) bits[b] = has_bit(heap, 3 + b);
  const auto entry = [&](int i) {
    const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(table) + i);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), bytes);
  };
  return selected<kTables>(entry, bits);
}

// As walk.h says: thresholds come out of registers by shuffles, and the row's value out of the tile's by blends.
template <int kFeatures, bool kPacked>
void descend_tree(const uint16_t* code, const uint16_t* feature, int, int top, const uint16_t* codes, int64_t tiles,
                  Ahead& ahead, uint32_t* below) {
  const __m256i last = _mm256_set1_epi16(static_cast<short>((1 << top) - 1));
  for (int64_t half = 0; half < 2 * tiles; ++half) {
    ahead.fetch();
    const uint16_t* rows = codes + half / 2 * kFeatures * kTile + half % 2 * 16;
    const auto value = [&](int i) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(rows + i * kTile)); };
    __m256i heap = _mm256_set1_epi16(1);
    const auto step = [&]<int kTables>(const uint16_t* at, const uint16_t* feature_at) {
      const __m256i threshold = lookup<kTables>(at, heap);
      const __m256i number = kPacked ? threshold : lookup<kTables>(feature_at, heap);
      __m256i bits[4] = {};
      for (int b = 0; (1 << b) < kFeatures; ++b) bits[b] = has_bit(number, b);
      const __m256i compared = selected<kFeatures>(value, bits);
      const __m256i left = _mm256_cmpeq_epi16(_mm256_max_epu16(compared, threshold), threshold);  // -1 where it is
      heap = _mm256_add_epi16(_mm256_add_epi16(heap, heap), _mm256_add_epi16(_mm256_set1_epi16(1), left));
    };
    const int shallow = top < 3 ? top : 3;
    for (int level = 0; level < shallow; ++level) step.template operator()<1>(code, feature);
    if (top > 3) step.template operator()<1>(code + 8, feature + 8);
    if (top > 4) step.template operator()<2>(code + 16, feature + 16);
    if (top > 5) step.template operator()<4>(code + 32, feature + 32);
    if (top > 6) step.template operator()<8>(code + 64, feature + 64);
    if (top > 7) step.template operator()<16>(code + 128, feature + 128);
    heap = _mm256_and_si256(heap, last);
    __m256i* const to = reinterpret_cast<__m256i*>(below + half * 16);
    _mm256_storeu_si256(to, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(heap)));
    _mm256_storeu_si256(to + 1, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(heap, 1)));
  }
}

}  // namespace
}  // namespace fastens::forest
