// From codes to leaves. Part of the kernels of one instruction set: see kernels.h.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

#if defined(__AVX2__) && !defined(__AVX512BW__)
#include "descend_avx2.h"
#endif

namespace fastens::forest {
namespace {

// Follows the nodes below `leaf`, eight rows at a time so that their loads overlap, until all rows are at a leaf; a
// node index goes in and a leaf row comes out.
template <class Code, bool kMissing>
void follow(const Layout& layout, const Node<Code>* nodes, const uint32_t* leaf_of, const Code* codes, int64_t tiles,
            uint32_t* leaf) {
  constexpr int kRows = 8, kSteps = 3;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Code* features = codes + tile * layout.mux_features * kTile;
    for (int64_t first = 0; first < kTile; first += kRows) {
      uint32_t at[kRows];
      for (int i = 0; i < kRows; ++i) at[i] = leaf[tile * kTile + first + i];
      for (uint32_t moved = 1; moved;) {
        moved = 0;
        for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const Node<Code> node = nodes[at[i]];
            const Code feature = node.feature & static_cast<Code>(~Node<Code>::kDefaultLeft);
            const Code code = features[feature * kTile + first + i];
            uint32_t right = code > node.code;
            if (kMissing && code == Node<Code>::kMissing) right = !(node.feature & Node<Code>::kDefaultLeft);
            const uint32_t next = node.left + right;
            moved |= next ^ at[i];
            at[i] = next;
          }
          if (step + 1 < kSteps) moved = 0;
        }
      }
      for (int i = 0; i < kRows; ++i) leaf[tile * kTile + first + i] = leaf_of[at[i]];
    }
  }
}

template <class Code>
void follow(const Layout& layout, const Node<Code>* nodes, int64_t tree, const Code* codes, int64_t tiles, bool missing,
            uint32_t* leaf) {
  const uint32_t* leaf_of = layout.leaf_of.data() + layout.root[tree];
  if (missing) {
    follow<Code, true>(layout, nodes + layout.root[tree], leaf_of, codes, tiles, leaf);
  } else {
    follow<Code, false>(layout, nodes + layout.root[tree], leaf_of, codes, tiles, leaf);
  }
}

constexpr int64_t kFewRows = 4;  // up to so many, trees are followed side by side instead of rows

// The same for the rows of a few, eight trees at a time.
template <class Code>
void follow_trees(const Layout& layout, const Node<Code>* nodes, int64_t begin, int64_t last, const Code* codes,
                  int64_t rows, int64_t stride, uint32_t* leaf) {
  constexpr int kTrees = 8;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t tree = begin; tree < last; tree += kTrees) {
      const int count = static_cast<int>(last - tree < kTrees ? last - tree : kTrees);
      uint32_t* const own = leaf + (tree - begin) * stride + row;
      const Node<Code>* root[kTrees];
      uint32_t at[kTrees];
      for (int t = 0; t < kTrees; ++t) {
        const int of = t < count ? t : 0;
        root[t] = nodes + layout.root[tree + of];
        at[t] = own[of * stride];
      }
      for (uint32_t moved = 1; moved;) {
        moved = 0;
#pragma GCC unroll 8
        for (int t = 0; t < kTrees; ++t) {
          const Node<Code> node = root[t][at[t]];
          const Code code = codes[(node.feature & static_cast<Code>(~Node<Code>::kDefaultLeft)) * kTile + row];
          const bool missing_left = code == Node<Code>::kMissing && (node.feature & Node<Code>::kDefaultLeft);
          const uint32_t next = node.left + (code > node.code && !missing_left);
          moved |= next ^ at[t];
          at[t] = next;
        }
      }
      for (int t = 0; t < count; ++t) own[t * stride] = layout.leaf_of[layout.root[tree + t] + at[t]];
    }
  }
}

#ifdef __AVX512BW__
constexpr int kMostSelected = kMaxMuxFeatures;

// Of kCount features' registers, the one that each lane's feature number names: bit b of the number is in bits[b].
template <int kCount>
__m512i selected(const __m512i* features, const __mmask32* bits) {
  if constexpr (kCount == 1) {
    return _mm512_load_si512(features);
  } else {
    constexpr int kBit = 31 - __builtin_clz(kCount - 1), kHalf = 1 << kBit;
    return _mm512_mask_blend_epi16(bits[kBit], selected<kHalf>(features, bits),
                                   selected<kCount - kHalf>(features + kHalf, bits));
  }
}

// The heap index of each row's node below the top levels, minus 2^top. Thresholds come out of registers by permutes,
// and the row's value out of the tile's registers by blends: there is no gather.
template <int kFeatures, bool kPacked>
void descend_tree(const uint16_t* code, const uint16_t* feature, int feature_bits, int top, const uint16_t* codes,
                  int64_t tiles, Ahead& ahead, uint32_t* below) {
  const auto number = [&](int heap) { return kPacked ? code[heap] & ((1 << feature_bits) - 1) : feature[heap]; };
  const int first = number(1), second[2] = {number(2), number(3)};
  const __m512i *thresholds = reinterpret_cast<const __m512i*>(code),
                *numbers = reinterpret_cast<const __m512i*>(feature);
  const __m512i low = _mm512_load_si512(thresholds), one = _mm512_set1_epi16(1);
  const __m512i last = _mm512_set1_epi16(static_cast<short>((1 << top) - 1));
  const auto step = [&](const __m512i* values, __m512i threshold, __m512i number, __m512i heap) {
    __mmask32 bits[6] = {};
    for (int b = 0; (1 << b) < kFeatures; ++b) {
      bits[b] = _mm512_test_epi16_mask(number, _mm512_set1_epi16(static_cast<short>(1 << b)));
    }
    const __mmask32 right = _mm512_cmpgt_epu16_mask(selected<kFeatures>(values, bits), threshold);
    heap = _mm512_add_epi16(heap, heap);
    return _mm512_mask_add_epi16(heap, right, heap, one);
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    ahead.fetch();
    ahead.fetch();
    const __m512i* values = reinterpret_cast<const __m512i*>(codes) + tile * kFeatures;
    __mmask32 right = _mm512_cmpgt_epu16_mask(values[first], _mm512_set1_epi16(static_cast<short>(code[1])));
    __m512i heap = _mm512_mask_blend_epi16(right, _mm512_set1_epi16(2), _mm512_set1_epi16(3));
    if (top > 1) {
      const __m512i value = _mm512_mask_blend_epi16(right, values[second[0]], values[second[1]]);
      const __m512i threshold = _mm512_mask_blend_epi16(right, _mm512_set1_epi16(static_cast<short>(code[2])),
                                                        _mm512_set1_epi16(static_cast<short>(code[3])));
      right = _mm512_cmpgt_epu16_mask(value, threshold);
      heap = _mm512_add_epi16(heap, heap);
      heap = _mm512_mask_add_epi16(heap, right, heap, one);
    }
    const int shallow = top < 5 ? top : 5;
    for (int level = 2; level < shallow; ++level) {
      const __m512i threshold = _mm512_permutexvar_epi16(heap, low);
      heap = step(values, threshold, kPacked ? threshold : _mm512_permutexvar_epi16(heap, numbers[0]), heap);
    }
    if (top > 5) {
      const __m512i threshold = _mm512_permutexvar_epi16(heap, thresholds[1]);
      heap = step(values, threshold, kPacked ? threshold : _mm512_permutexvar_epi16(heap, numbers[1]), heap);
    }
    if (top > 6) {
      const __m512i threshold = _mm512_permutex2var_epi16(thresholds[2], heap, thresholds[3]);
      heap =
          step(values, threshold, kPacked ? threshold : _mm512_permutex2var_epi16(numbers[2], heap, numbers[3]), heap);
    }
    if (top > 7) {
      const __mmask32 half = _mm512_test_epi16_mask(heap, _mm512_set1_epi16(64));
      const auto lookup = [&](const __m512i* table) {
        return _mm512_mask_blend_epi16(half, _mm512_permutex2var_epi16(table[4], heap, table[5]),
                                       _mm512_permutex2var_epi16(table[6], heap, table[7]));
      };
      const __m512i threshold = lookup(thresholds);
      heap = step(values, threshold, kPacked ? threshold : lookup(numbers), heap);
    }
    heap = _mm512_and_si512(heap, last);
    _mm512_storeu_si512(below + tile * kTile, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(heap)));
    _mm512_storeu_si512(below + tile * kTile + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(heap, 1)));
  }
}
#endif

#ifdef __AVX2__
template <int kFeatures>
void descend_as(const Layout& layout, int64_t tree, const uint16_t* codes, int64_t tiles, Ahead& ahead,
                uint32_t* below) {
  const uint16_t* code = layout.top_code.data() + tree * 256;
  if (layout.packed_codes) {
    descend_tree<kFeatures, true>(code, nullptr, layout.feature_bits, layout.top, codes, tiles, ahead, below);
  } else {
    descend_tree<kFeatures, false>(code, layout.top_feature.data() + tree * 256, 0, layout.top, codes, tiles, ahead,
                                   below);
  }
}

void descend(const Layout& layout, int64_t tree, const uint16_t* codes, int64_t tiles, Ahead& ahead, uint32_t* below) {
  switch (layout.mux_features) {
#define FASTENS_DESCEND(n) \
  case n:                  \
    return descend_as<n>(layout, tree, codes, tiles, ahead, below)
    FASTENS_DESCEND(1);
    FASTENS_DESCEND(2);
    FASTENS_DESCEND(3);
    FASTENS_DESCEND(4);
    FASTENS_DESCEND(5);
    FASTENS_DESCEND(6);
    FASTENS_DESCEND(7);
    FASTENS_DESCEND(8);
    FASTENS_DESCEND(12);
    FASTENS_DESCEND(16);
#ifdef __AVX512BW__
    FASTENS_DESCEND(32);
    FASTENS_DESCEND(48);
    FASTENS_DESCEND(64);
#endif
#undef FASTENS_DESCEND
  }
}
#endif

// The node of each row where following begins; false where it is a leaf row already.
bool enter([[maybe_unused]] const Layout& layout, [[maybe_unused]] int64_t tree, [[maybe_unused]] const void* codes,
           int64_t tiles, [[maybe_unused]] bool missing, [[maybe_unused]] Ahead& ahead, uint32_t* leaf) {
  const int64_t rows = tiles * kTile;
#ifdef __AVX2__
  if (layout.top > 0 && layout.mux_features <= kMostSelected && !missing) {
    descend(layout, tree, static_cast<const uint16_t*>(codes), tiles, ahead, leaf);
    if (layout.whole) return false;
    const uint32_t* entry = layout.entry.data() + tree * layout.top_size;
    for (int64_t i = 0; i < rows; ++i) leaf[i] = entry[leaf[i]];
    return true;
  }
#endif
  for (int64_t i = 0; i < rows; ++i) leaf[i] = 0;
  return true;
}

template <class Code>
void find_leaves(const Layout& layout, const Node<Code>* nodes, int64_t begin, int64_t last, const Code* codes,
                 int64_t rows, bool missing, Ahead& ahead, uint32_t* leaf) {
  const int64_t tiles = (rows + kTile - 1) / kTile, stride = tiles * kTile;
  bool follows = false;
  for (int64_t tree = begin; tree < last; ++tree) {
    uint32_t* const own = leaf + (tree - begin) * stride;
    follows = enter(layout, tree, codes, tiles, missing, ahead, own);
    if (follows && rows > kFewRows) follow(layout, nodes, tree, codes, tiles, missing, own);
  }
  if (follows && rows <= kFewRows) follow_trees(layout, nodes, begin, last, codes, rows, stride, leaf);
}

void find_leaves(const Layout& layout, int64_t begin, int64_t last, const void* codes, int64_t rows, bool missing,
                 Ahead& ahead, uint32_t* leaf) {
  if (layout.wide_codes) {
    return find_leaves(layout, layout.wide_nodes.data(), begin, last, static_cast<const uint32_t*>(codes), rows,
                       missing, ahead, leaf);
  }
  find_leaves(layout, layout.nodes.data(), begin, last, static_cast<const uint16_t*>(codes), rows, missing, ahead,
              leaf);
}

}  // namespace
}  // namespace fastens::forest
