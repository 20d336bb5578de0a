// Features to codes: the rank of each value among the forest's thresholds of that feature, in tiles
// [tile, feature, 32 rows]. Part of the kernels of one instruction set: see kernels.h.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

namespace fastens::forest {
namespace {

// How many of the sorted thresholds are smaller than x.
template <class V>
uint32_t rank_by_bisection(const Cuts& feature, const V* cuts, V x) {
  uint32_t rank = 0;
  for (int step = feature.steps - 1; step >= 0; --step) {
    const uint32_t probe = rank + (uint32_t{1} << step);
    if (probe <= feature.count && cuts[probe - 1] < x) rank = probe;
  }
  return rank;
}

uint32_t rank_of(const Cuts& feature, const double* cuts, const uint16_t*, double x) {
  return rank_by_bisection(feature, cuts, x);
}

#ifdef __AVX512BW__
__m512i ranks_of(const Cuts& feature, const float* cuts, const uint16_t* buckets, __m512 x) {
  if (feature.num_buckets == 0) {
    __m512i rank = _mm512_setzero_si512();
    const __m512i count = _mm512_set1_epi32(static_cast<int>(feature.count));
    for (int step = feature.steps - 1; step >= 0; --step) {
      const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(1 << step));
      const __mmask16 inside = _mm512_cmple_epi32_mask(probe, count);
      const __m512 cut = _mm512_mask_i32gather_ps(x, inside, probe, cuts - 1, 4);
      rank = _mm512_mask_mov_epi32(rank, _mm512_mask_cmp_ps_mask(inside, cut, x, _CMP_LT_OQ), probe);
    }
    return rank;
  }
  __m512 place = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(feature.low)), _mm512_set1_ps(feature.scale));
  place = _mm512_max_ps(place, _mm512_setzero_ps());  // NaN becomes 0
  place = _mm512_min_ps(place, _mm512_set1_ps(static_cast<float>(feature.num_buckets - 1)));
  __m512i rank = _mm512_i32gather_epi32(_mm512_cvttps_epi32(place), buckets, 2);
  rank = _mm512_and_si512(rank, _mm512_set1_epi32(0xFFFF));
  __mmask16 active = 0xFFFF;
  while (active) {
    const __m512 cut = _mm512_mask_i32gather_ps(x, active, rank, cuts, 4);
    active = _mm512_mask_cmp_ps_mask(active, cut, x, _CMP_LT_OQ);
    rank = _mm512_mask_add_epi32(rank, active, rank, _mm512_set1_epi32(1));
  }
  return rank;
}

template <class Code>
void ranks_of_tile(const Layout& layout, const Cuts& feature, const float* values, uint32_t* ranks) {
  const float* cuts = layout.cuts.data() + feature.begin;
  const uint16_t* buckets = layout.buckets.data() + feature.first_bucket;
  for (int64_t i = 0; i < kTile; i += 16) {
    _mm512_storeu_si512(ranks + i, ranks_of(feature, cuts, buckets, _mm512_loadu_ps(values + i)));
  }
}
#else
uint32_t rank_of(const Cuts& feature, const float* cuts, const uint16_t* buckets, float x) {
  if (feature.num_buckets == 0) return rank_by_bisection(feature, cuts, x);
  float place = (x - feature.low) * feature.scale;
  place = place > 0 ? place : 0;  // NaN becomes 0
  const float last = static_cast<float>(feature.num_buckets - 1);
  uint32_t rank = buckets[static_cast<int32_t>(place < last ? place : last)];
  while (cuts[rank] < x) ++rank;
  return rank;
}

template <class Code>
void ranks_of_tile(const Layout& layout, const Cuts& feature, const float* values, uint32_t* ranks) {
  const float* cuts = layout.cuts.data() + feature.begin;
  const uint16_t* buckets = layout.buckets.data() + feature.first_bucket;
  for (int64_t i = 0; i < kTile; ++i) ranks[i] = rank_of(feature, cuts, buckets, values[i]);
}
#endif

template <class Code>
void ranks_of_tile(const Layout& layout, const Cuts& feature, const double* values, uint32_t* ranks) {
  const double* cuts = layout.double_cuts.data() + feature.begin;
  for (int64_t i = 0; i < kTile; ++i) ranks[i] = rank_of(feature, cuts, nullptr, values[i]);
}

template <class Code, class V>
int encode_as(const Layout& layout, const Rows& rows, int64_t first, int64_t count, Code* codes) {
  int seen = kNothing;
  for (int64_t tile = 0; tile * kTile < count; ++tile) {
    const int64_t n = count - tile * kTile < kTile ? count - tile * kTile : kTile;
    for (int64_t f = 0; f < layout.num_features; ++f) {
      alignas(64) V values[kTile];
      alignas(64) uint32_t ranks[kTile];
      const int64_t at = (first + tile * kTile) * rows.row_stride + f * rows.feature_stride;
      if (rows.is_double) {
        const double* from = static_cast<const double*>(rows.data) + at;
        for (int64_t i = 0; i < n; ++i) values[i] = static_cast<V>(from[i * rows.row_stride]);
      } else {
        const float* from = static_cast<const float*>(rows.data) + at;
        for (int64_t i = 0; i < n; ++i) values[i] = static_cast<V>(from[i * rows.row_stride]);
      }
      for (int64_t i = n; i < kTile; ++i) values[i] = values[n - 1];  // takes the last row's way, whose nodes are near
      int nan = 0, infinite = 0;
      for (int64_t i = 0; i < kTile; ++i) {
        const V difference = values[i] - values[i];  // NaN for NaN and infinities
        nan |= values[i] != values[i];
        infinite |= difference != difference;
      }
      ranks_of_tile<Code>(layout, layout.cuts_of[f], values, ranks);
      const uint32_t low = layout.packed_codes ? static_cast<uint32_t>(f) : 0;
      Code* out = codes + (tile * layout.mux_features + f) * kTile;
      for (int64_t i = 0; i < kTile; ++i) out[i] = static_cast<Code>(ranks[i] << layout.feature_bits | low);
      if (nan | infinite) {
        for (int64_t i = 0; i < kTile; ++i) {
          if (values[i] != values[i]) {
            out[i] = Node<Code>::kMissing;
            seen |= kNaN;
          } else if (values[i] - values[i] != 0) {
            seen |= kInfinity;
          }
        }
      }
    }
  }
  return seen;
}

int encode(const Layout& layout, const Rows& rows, int64_t first, int64_t count, void* codes) {
  if (layout.wide_codes) {
    uint32_t* out = static_cast<uint32_t*>(codes);
    return layout.double_inputs ? encode_as<uint32_t, double>(layout, rows, first, count, out)
                                : encode_as<uint32_t, float>(layout, rows, first, count, out);
  }
  uint16_t* out = static_cast<uint16_t*>(codes);
  return layout.double_inputs ? encode_as<uint16_t, double>(layout, rows, first, count, out)
                              : encode_as<uint16_t, float>(layout, rows, first, count, out);
}

}  // namespace
}  // namespace fastens::forest
