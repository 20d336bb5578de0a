// What a kernel that reduces over members is launched with, and the loads and stores that all of them use. The code
// that runs per element also compiles for the host, where the tests run it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTENS_DEVICE __device__ __forceinline__
#else
#define FASTENS_DEVICE inline
#endif

namespace fastens {

constexpr int kFew = 16;          // members that a kernel holds in registers
constexpr int kMaxWeights = 256;  // weights that fit a kernel's parameters
constexpr int kVectorBytes = 16;  // widest access of one thread

enum class Rule : int { kNone, kLinear, kMedian, kLargest, kGeometric, kAlternating };

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// out = a x + b s + c noise, s = rule_k(S_k), or u + g (s' - u) of the two halves of a guided batch.
struct Job {
  const void* data[kFew] = {};  // members; with a step only the first
  int64_t step = 0;             // elements from one member to the next; 0: read from `data`
  int num_members = 0;
  int64_t count = 0;   // elements of the result
  int64_t length = 0;  // elements of one sample
  int64_t batch = 0;   // samples of the result
  void* out = nullptr;
  void* variance = nullptr;            // [rows of a member, ...] or null
  const void* x = nullptr;             // like out, or null
  const void* noise = nullptr;         // like out, or null
  const void* coefficients = nullptr;  // wide [3, batch]: a, b, c; or null for 0, 1, 0
  const void* guidance = nullptr;      // wide [batch], or null
  const void* lows = nullptr;          // geometric: wide [rows] or [1], the smallest value of a sample
  int64_t low_step = 1;
  bool average = true;    // median of even K: of the two middle values, or the lower
  bool absolute = false;  // largest: the magnitude, without sign
  bool weighted = false;
  double scale = 1;              // linear: scale * sum_k w_k S_k
  double eps = 0;                // geometric
  int64_t seed = 0, offset = 0;  // alternating
};

struct FewWeights {
  double weight[kFew] = {};
};
struct ManyWeights {
  double weight[kMaxWeights] = {};
};

template <class T>
FASTENS_DEVICE const T* member(const Job& job, int64_t k) {
  return job.step ? static_cast<const T*>(job.data[0]) + k * job.step : static_cast<const T*>(job.data[k]);
}

template <class T, int kVec>
struct alignas(kVec * sizeof(T)) Pack {
  T element[kVec];
};

template <class T, int kVec>
FASTENS_DEVICE Pack<T, kVec> load(const void* data, int64_t at) {
  return *reinterpret_cast<const Pack<T, kVec>*>(static_cast<const T*>(data) + at);
}

template <class T, int kVec, class W>
FASTENS_DEVICE void store(void* data, int64_t at, const W (&values)[kVec]) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int v = 0; v < kVec; ++v) pack.element[v] = static_cast<T>(values[v]);
  *reinterpret_cast<Pack<T, kVec>*>(static_cast<T*>(data) + at) = pack;
}

}  // namespace fastens
