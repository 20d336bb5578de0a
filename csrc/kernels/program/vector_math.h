// Activations on vectors of float32, written so that a compiler turns them into whatever vectors the machine has.

constexpr int kRegisterLanes = FASTENS_REGISTER_BYTES / 4;  // wider vectors than a register are kept in memory

typedef float Vector __attribute__((vector_size(kRegisterLanes * 4)));
typedef float LooseVector __attribute__((vector_size(kRegisterLanes * 4), aligned(4)));
typedef int32_t IntVector __attribute__((vector_size(kRegisterLanes * 4)));

FASTENS_INLINE Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
FASTENS_INLINE void store(float* p, Vector v) { *reinterpret_cast<LooseVector*>(p) = v; }
FASTENS_INLINE Vector splat(float x) { return x - Vector{}; }

// exp(x) is a normal number from here on, and from there on a number at all.
constexpr float kNormalFrom = -87.33654f, kNumberFrom = -104.0f;

// exp(x) to 2 units in the last place; overflows to inf, keeps NaN. It is 0 below `least`: a subnormal counts as little
// beside the 1 that sums of these have, and slows down what multiplies it.
FASTENS_INLINE Vector exponential(Vector x, float least = kNormalFrom) {
  const Vector high = splat(88.72283f), low = splat(least);
  const Vector clipped = x > high ? high : x < low ? low : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (clipped * 1.44269504f + magic) - magic;
  const Vector r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vector e = p * (r * r) + r + 1.0f;
  // 2^n in two factors, because n reaches 128 and -150
  const IntVector whole = __builtin_convertvector(clipped == clipped ? n : Vector{}, IntVector);
  const IntVector half = whole >> 1, rest = whole - half;
  const Vector scaled = e * reinterpret_cast<Vector>((half + 127) << 23) * reinterpret_cast<Vector>((rest + 127) << 23);
  return x > high ? splat(INFINITY) : x < low ? Vector{} : scaled;
}

FASTENS_INLINE Vector silu(Vector x) { return x / (exponential(-x) + 1.0f); }

// tanh(x) from exp(-2|x|), with the sign put back, that of zero too; near 0, where that cancels, the Taylor series to
// x^9, whose next term is 1e-8 of the value at 0.25.
FASTENS_INLINE Vector hyperbolic_tangent(Vector x) {
  const IntVector sign = reinterpret_cast<IntVector>(x) & INT32_MIN;
  const Vector a = reinterpret_cast<Vector>(reinterpret_cast<IntVector>(x) ^ sign);
  const Vector e = exponential(a * -2.0f);
  const Vector far = (1.0f - e) / (1.0f + e);
  const Vector s = x * x;
  const Vector near = a + a * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  const Vector y = a < 0.25f ? near : far;
  return reinterpret_cast<Vector>(reinterpret_cast<IntVector>(y) | sign);
}

FASTENS_INLINE Vector gelu_tanh(Vector x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// 0.5 x (1 + erf(x / sqrt 2)); erf is libm's, a lane at a time.
FASTENS_INLINE Vector gelu(Vector x) {
  Vector e;
  for (int i = 0; i < kRegisterLanes; ++i) e[i] = std::erf(x[i] * 0.70710678f);
  return 0.5f * x * (1.0f + e);
}

FASTENS_INLINE Vector activated(Vector x, Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return silu(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    default:
      return x;
  }
}

// The first n values at p; the rest is zero.
FASTENS_INLINE Vector load_some(const float* p, int64_t n) {
  if (n >= kRegisterLanes) return load(p);
  alignas(64) float values[kRegisterLanes] = {};
  std::memcpy(values, p, n * sizeof(float));
  return load(values);
}

FASTENS_INLINE void store_some(float* p, Vector v, int64_t n) {
  if (n >= kRegisterLanes) {
    store(p, v);
    return;
  }
  alignas(64) float values[kRegisterLanes];
  store(values, v);
  std::memcpy(p, values, n * sizeof(float));
}

FASTENS_INLINE float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kRegisterLanes; ++i) total += v[i];
  return total;
}
