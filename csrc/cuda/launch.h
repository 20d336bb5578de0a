// The kernels over a job and their launches, for one dtype of the members: each dtype is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "reduce.h"

namespace fastens {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;  // 2048 threads, as many as a multiprocessor holds

// A grid that fills the device and strides over the rest.
struct Launch {
  cudaStream_t stream;
  int64_t max_blocks;

  unsigned blocks(int64_t work) const { return static_cast<unsigned>(std::clamp<int64_t>(work, 1, max_blocks)); }
};

// What a job's addresses and sizes allow: accesses of 16 bytes, or of one element.
template <class T>
bool wide_access(const Job& job) {
  constexpr int64_t kVec = kVectorBytes / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  bool wide = job.count % kVec == 0 && job.step % kVec == 0 && (job.batch == 1 || job.length % kVec == 0);
  for (int k = 0; k < (job.step ? 1 : job.num_members); ++k) wide &= aligned(job.data[k]);
  return wide && aligned(job.out) && aligned(job.variance) && aligned(job.x) && aligned(job.noise);
}

template <class T, int kVec, class Combine>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Job job, const __grid_constant__ typename Combine::Weights weights) {
  const int64_t stride = int64_t{gridDim.x} * kThreads, vectors = job.count / kVec;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors; i += stride) {
    reduce_at<T, kVec, Combine>(job, weights, i * kVec);
  }
}

// The smallest value of a block's threads; NaN wins.
template <class W>
__device__ W smallest_of_block(W low) {
  __shared__ W lows[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) low = smaller(__shfl_xor_sync(0xFFFFFFFFu, low, lane), low);
  if (threadIdx.x % 32 == 0) lows[threadIdx.x / 32] = low;
  __syncthreads();
  low = lows[0];
  for (int w = 1; w < kThreads / 32; ++w) low = smaller(lows[w], low);
  __syncthreads();
  return low;
}

// parts[r, p] = the smallest value of all members in part p, `span` elements, of row r.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    smallest_kernel(const __grid_constant__ Job job, int64_t rows, int64_t parts_per_row, int64_t span,
                    typename Wide<T>::type* parts) {
  using W = typename Wide<T>::type;
  for (int64_t part = blockIdx.x; part < rows * parts_per_row; part += gridDim.x) {
    const int64_t row = part / parts_per_row, start = part % parts_per_row * span;
    const int64_t end = min(start + span, job.length);
    W low = static_cast<W>(INFINITY);
    for (int64_t at = start + int64_t{threadIdx.x} * kVec; at < end; at += kThreads * kVec) {
      for (int k = 0; k < job.num_members; ++k) {
        const Pack<T, kVec> pack = load<T, kVec>(member<T>(job, k), row * job.length + at);
#pragma unroll
        for (int i = 0; i < kVec; ++i) low = smaller(static_cast<W>(pack.element[i]), low);
      }
    }
    low = smallest_of_block(low);
    if (threadIdx.x == 0) parts[part] = low;
  }
}

// lows[r] = the smallest of `length` values of row r.
template <class W>
__global__ void __launch_bounds__(kThreads) smallest_row_kernel(const W* parts, int64_t rows, int64_t length, W* lows) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    W low = static_cast<W>(INFINITY);
    for (int64_t i = threadIdx.x; i < length; i += kThreads) low = smaller(parts[row * length + i], low);
    low = smallest_of_block(low);
    if (threadIdx.x == 0) lows[row] = low;
  }
}

template <class T, int kVec, class Combine, class Weights>
void launch_kernel(const Job& job, const Weights& weights, const Launch& launch) {
  const int64_t blocks = (job.count / kVec + kThreads - 1) / kThreads;
  reduce_kernel<T, kVec, Combine><<<launch.blocks(blocks), kThreads, 0, launch.stream>>>(job, weights);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, Rule kRule, int K = 1>
void launch_few(const Job& job, const FewWeights& weights, const Launch& launch) {
  if constexpr (K <= kFew) {
    if (job.num_members != K) return launch_few<T, kRule, K + 1>(job, weights, launch);
    constexpr int kVec = kVectorBytes / sizeof(T);
    launch_kernel<T, kVec, Few<T, K, kVec, kRule>>(job, weights, launch);
  }
}

template <class T, Rule kRule>
void launch_rule(const Job& job, const ManyWeights& weights, const Launch& launch) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  if (!wide_access<T>(job)) return launch_kernel<T, 1, Many<T, 1, kRule>>(job, weights, launch);
  if constexpr (kRule != Rule::kAlternating) {
    if (job.step == 0) {
      FewWeights few;
      std::copy_n(weights.weight, kFew, few.weight);
      return launch_few<T, kRule>(job, few, launch);
    }
  }
  launch_kernel<T, kVec, Many<T, kVec, kRule>>(job, weights, launch);
}

// Reduces a job of members of type T; `count` > 0.
template <class T>
void reduce(const Job& job, Rule rule, const ManyWeights& weights, const Launch& launch) {
  switch (rule) {
    case Rule::kNone:
      return launch_rule<T, Rule::kNone>(job, weights, launch);
    case Rule::kLinear:
      return launch_rule<T, Rule::kLinear>(job, weights, launch);
    case Rule::kMedian:
      return launch_rule<T, Rule::kMedian>(job, weights, launch);
    case Rule::kLargest:
      return launch_rule<T, Rule::kLargest>(job, weights, launch);
    case Rule::kGeometric:
      return launch_rule<T, Rule::kGeometric>(job, weights, launch);
    case Rule::kAlternating:
      return launch_rule<T, Rule::kAlternating>(job, weights, launch);
  }
}

// Parts of a row that a block each looks through for the smallest value.
inline int64_t parts_of(const Job& job, int64_t rows, const Launch& launch) {
  const int64_t wanted = std::max<int64_t>(1, launch.max_blocks / std::max<int64_t>(1, rows));
  return std::min(wanted, (job.length + 4 * kThreads - 1) / (4 * kThreads));
}

// Fills `lows` [rows], or [1] over the whole batch, by way of `parts` [rows, parts_of(...)].
template <class T>
void smallest(const Job& job, int64_t rows, bool whole_batch, void* parts, void* lows, const Launch& launch) {
  using W = typename Wide<T>::type;
  constexpr int kVec = kVectorBytes / sizeof(T);
  const int64_t per_row = parts_of(job, rows, launch);
  const int64_t span = ((job.length + per_row - 1) / per_row + kVec - 1) / kVec * kVec;
  W* const to = static_cast<W*>(parts);
  if (wide_access<T>(job) && job.length % kVec == 0) {
    smallest_kernel<T, kVec>
        <<<launch.blocks(rows * per_row), kThreads, 0, launch.stream>>>(job, rows, per_row, span, to);
  } else {
    smallest_kernel<T, 1><<<launch.blocks(rows * per_row), kThreads, 0, launch.stream>>>(job, rows, per_row, span, to);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t results = whole_batch ? 1 : rows, each = whole_batch ? rows * per_row : per_row;
  smallest_row_kernel<W>
      <<<launch.blocks(results), kThreads, 0, launch.stream>>>(to, results, each, static_cast<W*>(lows));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Compiled in aggregate_<dtype>.cu.
#define FASTENS_REDUCE(prefix, T)                                                      \
  prefix template void reduce<T>(const Job&, Rule, const ManyWeights&, const Launch&); \
  prefix template void smallest<T>(const Job&, int64_t, bool, void*, void*, const Launch&);

}  // namespace fastens
