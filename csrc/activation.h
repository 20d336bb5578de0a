// The activations that an op can end in, of one value in float or double; see fastens/reference/_activation.py.
#pragma once

#include <cmath>
#include <string>

#include "isa/inline.h"
#include "kernels/program/layout.h"

#ifdef __CUDACC__
#define FASTENS_HOST_DEVICE __host__ __device__
#else
#define FASTENS_HOST_DEVICE
#endif

namespace fastens {

using program::Activation;

constexpr Activation kUnknownActivation = static_cast<Activation>(-1);

inline Activation activation_of(const std::string& name) {
  int64_t number = 0;
  for (const char* known : program::kActivationNames) {
    if (name == known) return static_cast<Activation>(number);
    ++number;
  }
  return kUnknownActivation;
}

template <class W>
FASTENS_HOST_DEVICE FASTENS_INLINE W activated(W y, Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return y / (W{1} + std::exp(-y));
    case Activation::kGelu:
      return W{0.5} * y * (W{1} + std::erf(y * W{0.7071067811865476}));
    case Activation::kGeluTanh:  // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
      return y / (W{1} + std::exp(W{-1.5957691216057308} * (y + W{0.044715} * y * y * y)));
    default:
      return y;
  }
}

}  // namespace fastens
