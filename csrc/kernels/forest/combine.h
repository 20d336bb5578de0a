// Leaves to the running state of each row. Part of the kernels of one instruction set: see kernels.h.
#pragma once

#include "isa/vectors.h"
#include "kernels.h"

namespace fastens::forest {
namespace {

constexpr int kWidth = FASTENS_REGISTER_BYTES / 8;

template <int N>
struct Vector {
  typedef double Values __attribute__((vector_size(8 * N)));
  typedef int64_t Bits __attribute__((vector_size(8 * N)));
};

template <int N>
using Values = typename Vector<N>::Values;

struct Leaf {
  const double* values;  // leaves of one tree
  const double* low;     // smallest output of each
  const uint32_t* of;    // [rows]
  double weight;
};

struct Sum {
  template <int N>
  FASTENS_INLINE static void add(Values<N>* state, Values<N> leaf, double, const double*, double) {
    state[0] += leaf;
  }
};

struct WeightedSum {
  template <int N>
  FASTENS_INLINE static void add(Values<N>* state, Values<N> leaf, double weight, const double*, double) {
    state[0] += weight * leaf;
  }
};

// The value of largest magnitude; ties stay with the earlier tree, which AVX-512's vrangepd would not do: of -2 and 2
// it takes the positive one.
struct Dominant {
  template <int N>
  FASTENS_INLINE static void add(Values<N>* state, Values<N> leaf, double, const double*, double) {
    using Bits = typename Vector<N>::Bits;
    const Bits magnitude = Bits{} + INT64_MAX;
    // The bits of non-negative doubles are in the order of their values.
    state[0] = ((Bits)leaf & magnitude) > ((Bits)state[0] & magnitude) ? leaf : state[0];
  }
};

// The same for leaves of which no two are opposite: of -2 and 2, vrangepd would take the positive one.
struct UntiedDominant {
  template <int N>
  FASTENS_INLINE static void add(Values<N>* state, Values<N> leaf, double weight, const double* extra, double eps) {
#ifdef __AVX512DQ__
    constexpr int kLargestMagnitudeSigned = 7;
    if constexpr (N == 8) {
      state[0] = _mm512_range_pd(leaf, state[0], kLargestMagnitudeSigned);
      return;
    }
#endif
    Dominant::add<N>(state, leaf, weight, extra, eps);
  }
};

// The product of ((S - base) + shift) + eps as a mantissa, at most 2^num_trees, and a sum of exponents.
struct Geometric {
  template <int N>
  FASTENS_INLINE static void add(Values<N>* state, Values<N> leaf, double, const double* extra, double eps) {
    using Bits = typename Vector<N>::Bits;
    const Bits bits = (Bits)(((leaf - extra[0]) + extra[1]) + eps);
    constexpr int64_t kOne = int64_t{1023} << 52;
    state[0] *= (Values<N>)((bits & ((int64_t{1} << 52) - 1)) | kOne);
    state[1] = (Values<N>)((Bits)state[1] + ((bits - kOne) >> 52));
  }

  // Moves the mantissas' own exponents to the sum.
  template <int N>
  FASTENS_INLINE static void normalise(Values<N>* state) {
    using Bits = typename Vector<N>::Bits;
    constexpr int64_t kOne = int64_t{1023} << 52;
    const Bits bits = (Bits)state[0];
    state[0] = (Values<N>)((bits & ((int64_t{1} << 52) - 1)) | kOne);
    state[1] = (Values<N>)((Bits)state[1] + ((bits - kOne) >> 52));
  }
};

// `parts` vectors of N doubles a leaf, kParts where that is not 0, and as many states of kStates vectors a row.
template <class Op, int N, int kStates, int kTrees, int kParts>
void add_leaves(const Leaf* leaf, int64_t parts, int64_t rows, const double* extra, double eps, Ahead& ahead,
                double* state) {
  if constexpr (kParts > 0) parts = kParts;
  for (int64_t row = 0; row < rows; ++row) {
    const double* own = extra ? extra + 2 * row : nullptr;
    if (row % 8 == 0) ahead.fetch();
    const double* at[kTrees];
#pragma GCC unroll 4
    for (int t = 0; t < kTrees; ++t) at[t] = leaf[t].values + leaf[t].of[row] * (parts * N);
    for (int64_t part = 0; part < parts; ++part) {
      Values<N>* to = reinterpret_cast<Values<N>*>(state) + (row * parts + part) * kStates;
      Values<N> running[kStates];
      for (int s = 0; s < kStates; ++s) running[s] = to[s];
#pragma GCC unroll 4
      for (int t = 0; t < kTrees; ++t) {
        const Values<N> value = *reinterpret_cast<const Values<N>*>(at[t] + part * N);
        Op::template add<N>(running, value, leaf[t].weight, own, eps);
      }
      if constexpr (kStates == 2) Op::template normalise<N>(running);
      for (int s = 0; s < kStates; ++s) to[s] = running[s];
    }
  }
}

constexpr int kGroup = 4;  // trees whose leaves are added at a time: their leaves stay in the first-level cache

template <class Op, int N, int kStates, int kParts>
void add_trees(const Leaf* leaf, int64_t trees, int64_t parts, int64_t rows, const double* extra, double eps,
               Ahead& ahead, double* state) {
  for (; trees >= kGroup; trees -= kGroup, leaf += kGroup) {
    add_leaves<Op, N, kStates, kGroup, kParts>(leaf, parts, rows, extra, eps, ahead, state);
  }
  for (; trees > 0; --trees, ++leaf) add_leaves<Op, N, kStates, 1, kParts>(leaf, parts, rows, extra, eps, ahead, state);
}

template <class Op, int kStates>
void add_trees(const Leaf* leaf, int64_t trees, int64_t stride, int64_t rows, const double* extra, double eps,
               Ahead& ahead, double* state) {
  constexpr int kFour = kWidth < 4 ? kWidth : 4;
  switch (stride) {
    case 1:
      return add_trees<Op, 1, kStates, 1>(leaf, trees, 1, rows, extra, eps, ahead, state);
    case 2:
      return add_trees<Op, 2, kStates, 1>(leaf, trees, 1, rows, extra, eps, ahead, state);
    case 4:
      return add_trees<Op, kFour, kStates, 4 / kFour>(leaf, trees, 4 / kFour, rows, extra, eps, ahead, state);
    case 8:
      return add_trees<Op, kWidth, kStates, 8 / kWidth>(leaf, trees, 8 / kWidth, rows, extra, eps, ahead, state);
    default:
      return add_trees<Op, kWidth, kStates, 0>(leaf, trees, stride / kWidth, rows, extra, eps, ahead, state);
  }
}

void lowest(const Leaf* leaf, int64_t trees, int64_t rows, double* state) {
  for (; trees > 0; --trees, ++leaf) {
    for (int64_t row = 0; row < rows; ++row) {
      const double low = leaf->low[leaf->of[row]];
      state[row] = low < state[row] ? low : state[row];
    }
  }
}

void combine(const Layout& layout, Combine how, int64_t begin, int64_t last, const uint32_t* of, int64_t leaf_stride,
             int64_t rows, const double* extra, double eps, Ahead& ahead, double* state) {
  Leaf leaf[kGroup];
  for (int64_t tree = begin; tree < last; tree += kGroup) {
    const int64_t trees = last - tree < kGroup ? last - tree : kGroup;
    for (int64_t t = 0; t < trees; ++t) {
      const int64_t row = layout.leaf_begin[tree + t];
      leaf[t] = {layout.leaves.data() + row * layout.stride, layout.leaf_low.data() + row,
                 of + (tree + t - begin) * leaf_stride, how == Combine::kWeightedSum ? extra[tree + t] : 1.0};
    }
    switch (how) {
      case Combine::kSum:
        add_trees<Sum, 1>(leaf, trees, layout.stride, rows, nullptr, 0, ahead, state);
        break;
      case Combine::kWeightedSum:
        add_trees<WeightedSum, 1>(leaf, trees, layout.stride, rows, nullptr, 0, ahead, state);
        break;
      case Combine::kDominant:
        add_trees<Dominant, 1>(leaf, trees, layout.stride, rows, nullptr, 0, ahead, state);
        break;
      case Combine::kUntiedDominant:
        add_trees<UntiedDominant, 1>(leaf, trees, layout.stride, rows, nullptr, 0, ahead, state);
        break;
      case Combine::kGeometric:
        add_trees<Geometric, 2>(leaf, trees, layout.stride, rows, extra, eps, ahead, state);
        break;
      case Combine::kLowest:
        lowest(leaf, trees, rows, state);
        break;
    }
  }
}

}  // namespace
}  // namespace fastens::forest
