// The median of many trees by ranks. Part of the kernels of one instruction set: see kernels.h.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

namespace fastens::forest {
namespace {

// Lane by lane, ranks of one register.
template <class Rank>
struct Lanes {
  static constexpr int kCount = FASTENS_REGISTER_BYTES / sizeof(Rank);
  typedef Rank Values __attribute__((vector_size(FASTENS_REGISTER_BYTES)));
};

// count + (1 where a < b)
template <class Rank, class V>
FASTENS_INLINE V plus_less(V count, V a, V b) {
#ifdef __AVX512BW__
  if constexpr (sizeof(Rank) == 2) {
    const __mmask32 less = _mm512_cmplt_epu16_mask((__m512i)a, (__m512i)b);
    return (V)_mm512_mask_sub_epi16((__m512i)count, less, (__m512i)count, _mm512_set1_epi16(-1));
  } else {
    const __mmask16 less = _mm512_cmplt_epu32_mask((__m512i)a, (__m512i)b);
    return (V)_mm512_mask_sub_epi32((__m512i)count, less, (__m512i)count, _mm512_set1_epi32(-1));
  }
#else
  return count - (V)(a < b);
#endif
}

// The lower and upper middle of `members` ranks in each lane of one register, bit by bit from the highest: the largest
// value that at most (members - 1) / 2 ranks are below.
template <class Rank>
void select_middles(const Rank* ranks, int64_t members, int64_t stride, int bits, Rank* lower_out, Rank* upper_out) {
  using V = typename Lanes<Rank>::Values;
  const Rank below = static_cast<Rank>((members - 1) / 2);
  const auto at = [&](int64_t m) { return *reinterpret_cast<const V*>(ranks + m * stride); };
  const auto count_below = [&](V bound) {
    V a{}, b{}, c{}, d{};
    int64_t m = 0;
    for (; m + 4 <= members; m += 4) {
      a = plus_less<Rank>(a, at(m), bound);
      b = plus_less<Rank>(b, at(m + 1), bound);
      c = plus_less<Rank>(c, at(m + 2), bound);
      d = plus_less<Rank>(d, at(m + 3), bound);
    }
    for (; m < members; ++m) a = plus_less<Rank>(a, at(m), bound);
    return a + b + c + d;
  };
  V lower{};
  for (int bit = bits - 1; bit >= 0; --bit) {
    const Rank value = static_cast<Rank>(Rank{1} << bit);  // named: under sanitizers a cast's operand is an int
    const V probe = lower | value;
    lower = count_below(probe) <= below ? probe : lower;
  }
  V upper = lower;
  if (members % 2 == 0) {
    V above = V{} + static_cast<Rank>(~Rank{0}), not_above{};
    for (int64_t m = 0; m < members; ++m) {
      const V value = at(m);
      const V greater = value > lower ? value : V{} + static_cast<Rank>(~Rank{0});
      above = greater < above ? greater : above;
      not_above = plus_less<Rank>(not_above, value, lower + static_cast<Rank>(1));
    }
    upper = not_above > static_cast<Rank>(below + 1) ? lower : above;
  }
  *reinterpret_cast<V*>(lower_out) = lower;
  *reinterpret_cast<V*>(upper_out) = upper;
}

// Copies kWidth ranks of each row's leaf, rows `outputs` apart: what is too much is overwritten by the next row.
template <class Rank, int kWidth>
void copy_ranks(const Rank* ranks, const uint32_t* leaf, int64_t rows, int64_t outputs, Rank* to) {
  for (int64_t row = 0; row < rows; ++row, to += outputs) {
    __builtin_memcpy(to, ranks + int64_t{leaf[row]} * kWidth, kWidth * sizeof(Rank));
  }
}

template <class Rank>
void copy_ranks(const Rank* ranks, const uint32_t* leaf, int64_t rows, int64_t outputs, int64_t width, Rank* to) {
  switch (width) {
    case 1:
      return copy_ranks<Rank, 1>(ranks, leaf, rows, outputs, to);
    case 2:
      return copy_ranks<Rank, 2>(ranks, leaf, rows, outputs, to);
    case 4:
      return copy_ranks<Rank, 4>(ranks, leaf, rows, outputs, to);
    case 8:
      return copy_ranks<Rank, 8>(ranks, leaf, rows, outputs, to);
    default:
      for (int64_t row = 0; row < rows; ++row, to += outputs) {
        __builtin_memcpy(to, ranks + leaf[row] * width, width * sizeof(Rank));
      }
  }
}

template <class Rank>
void median_of(const Layout& layout, const LeafRanks& leaf_ranks, const Rank* ranks, const uint32_t* leaf,
               int64_t leaf_stride, int64_t rows, bool average, Rank* scratch, double* out) {
  const int64_t outputs = layout.num_outputs, members = layout.num_trees;
  const int64_t together = median_rows(layout, sizeof(Rank)), lanes = median_lanes(layout, sizeof(Rank));
  Rank *lower = scratch, *upper = lower + kLanes, *columns = upper + kLanes;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t n = rows - row < together ? rows - row : together;
    for (int64_t m = 0; m < members; ++m) {
      copy_ranks(ranks + layout.leaf_begin[m] * leaf_ranks.stride, leaf + m * leaf_stride + row, n, outputs,
                 leaf_ranks.stride, columns + m * lanes);
    }
    for (int64_t lane = 0; lane < n * outputs; lane += Lanes<Rank>::kCount) {
      select_middles(columns + lane, members, lanes, leaf_ranks.bits, lower, upper);
      const int64_t used = n * outputs - lane < Lanes<Rank>::kCount ? n * outputs - lane : Lanes<Rank>::kCount;
      double* to = out + row * outputs + lane;
      for (int64_t i = 0, p = lane % outputs; i < used; ++i, p = p + 1 == outputs ? 0 : p + 1) {
        const double* sorted = leaf_ranks.sorted.data() + leaf_ranks.begin_of[p];
        to[i] = average ? 0.5 * sorted[lower[i]] + 0.5 * sorted[upper[i]] : sorted[lower[i]];
      }
    }
  }
}

void median(const Layout& layout, const LeafRanks& ranks, const uint32_t* leaf, int64_t leaf_stride, int64_t rows,
            bool average, void* scratch, double* out) {
  if (ranks.narrow.empty()) {
    median_of(layout, ranks, ranks.wide.data(), leaf, leaf_stride, rows, average, static_cast<uint32_t*>(scratch), out);
  } else {
    median_of(layout, ranks, ranks.narrow.data(), leaf, leaf_stride, rows, average, static_cast<uint16_t*>(scratch),
              out);
  }
}

}  // namespace
}  // namespace fastens::forest
