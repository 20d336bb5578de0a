// Chains of elementwise instructions on strided values, a block of the innermost dimension at a time.

constexpr int64_t kRun = 256;  // elements in one register
constexpr int kRegisters = kMaxInputs + kMaxInstructions;

template <class T>
FASTENS_INLINE void read_as(const char* from, int64_t stride, int64_t n, float* to) {
  const T* in = reinterpret_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(in[i * stride]);
}

FASTENS_INLINE void read_run(const char* from, int64_t dtype, int64_t stride, int64_t n, float* to) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat32:
      if (stride == 1) {
        std::memcpy(to, from, n * sizeof(float));
      } else {
        read_as<float>(from, stride, n, to);
      }
      break;
    case Dtype::kFloat64:
      read_as<double>(from, stride, n, to);
      break;
    case Dtype::kInt64:
      read_as<int64_t>(from, stride, n, to);
      break;
    case Dtype::kInt32:
      read_as<int32_t>(from, stride, n, to);
      break;
    default: {
      const uint16_t* in = reinterpret_cast<const uint16_t*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(in[i * stride]) << 16);
    }
  }
}

template <class T>
FASTENS_INLINE void write_as(const float* from, int64_t stride, int64_t n, char* to) {
  T* out = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) out[i * stride] = static_cast<T>(from[i]);
}

FASTENS_INLINE void write_run(const float* from, int64_t dtype, int64_t stride, int64_t n, char* to) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat32:
      if (stride == 1) {
        std::memcpy(to, from, n * sizeof(float));
      } else {
        write_as<float>(from, stride, n, to);
      }
      break;
    case Dtype::kFloat64:
      write_as<double>(from, stride, n, to);
      break;
    case Dtype::kInt64:
      write_as<int64_t>(from, stride, n, to);
      break;
    case Dtype::kInt32:
      write_as<int32_t>(from, stride, n, to);
      break;
    default: {
      uint16_t* out = reinterpret_cast<uint16_t*>(to);
      for (int64_t i = 0; i < n; ++i) out[i * stride] = bfloat16_of(from[i]);
    }
  }
}

FASTENS_INLINE void vectors(Opcode opcode, const float* a, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kRegisterLanes) {
    const Vector x = load(a + i);
    Vector y;
    switch (opcode) {
      case Opcode::kSilu:
        y = silu(x);
        break;
      case Opcode::kGelu:
        y = gelu(x);
        break;
      case Opcode::kGeluTanh:
        y = gelu_tanh(x);
        break;
      case Opcode::kSigmoid:
        y = 1.0f / (1.0f + exponential(-x));
        break;
      case Opcode::kTanh:
        y = hyperbolic_tangent(x);
        break;
      default:
        y = exponential(x, kNumberFrom);  // networks divide by sums of these alone, or take their logarithm
    }
    store(out + i, y);
  }
}

FASTENS_INLINE void instruct(Opcode opcode, const float* a, const float* b, float number, int64_t n, float* out) {
  switch (opcode) {
    case Opcode::kCopy:
      std::memcpy(out, a, n * sizeof(float));
      break;
    case Opcode::kAdd:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
      break;
    case Opcode::kSubtract:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
      break;
    case Opcode::kMultiply:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
      break;
    case Opcode::kDivide:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] / b[i];
      break;
    case Opcode::kAddNumber:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] + number;
      break;
    case Opcode::kMultiplyNumber:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] * number;
      break;
    case Opcode::kDivideNumber:  // not a product with 1 / number, whose last bit differs
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] / number;
      break;
    case Opcode::kNumberMinus:
      for (int64_t i = 0; i < n; ++i) out[i] = number - a[i];
      break;
    case Opcode::kNumberOver:
      for (int64_t i = 0; i < n; ++i) out[i] = number / a[i];
      break;
    case Opcode::kLog:
      for (int64_t i = 0; i < n; ++i) out[i] = std::log(a[i]);
      break;
    case Opcode::kSin:
      for (int64_t i = 0; i < n; ++i) out[i] = std::sin(a[i]);
      break;
    case Opcode::kCos:
      for (int64_t i = 0; i < n; ++i) out[i] = std::cos(a[i]);
      break;
    case Opcode::kSqrt:
      for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(a[i]);
      break;
    case Opcode::kSquare:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] * a[i];
      break;
    case Opcode::kRelu:
      for (int64_t i = 0; i < n; ++i) out[i] = a[i] < 0.0f ? 0.0f : a[i];
      break;
    case Opcode::kAbs:
      for (int64_t i = 0; i < n; ++i) out[i] = std::fabs(a[i]);
      break;
    default:
      vectors(opcode, a, n, out);
  }
}

// A copy without a change of dtype, which float32 registers would round.
FASTENS_INLINE void copy_run(const char* from, int64_t from_stride, int64_t size, int64_t n, char* to,
                             int64_t to_stride) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * to_stride * size, from + i * from_stride * size, size);
}

// A task is a share of the rows.
FASTENS_INLINE void run_gather(const Gather& step, const Slots& slots, int64_t task) {
  const int64_t* const members = slots.at<const int64_t>(step.members);
  const int64_t begin = step.rows * task / step.header.tasks, end = step.rows * (task + 1) / step.header.tasks;
  for (int64_t r = begin; r < end; ++r) {
    const float* const line = slots.at(step.table) + members[r] * step.count;
    std::memcpy(slots.at(step.out) + r * step.count, line, step.count * sizeof(float));
  }
}

// A task is a share of the runs along the innermost dimension.
FASTENS_INLINE void run_pointwise(const Pointwise& step, const Slots& slots, int64_t task) {
  alignas(64) float registers[kRegisters][kRun];
  const int64_t inner = step.sizes[kMaxDims - 1];
  int64_t outer = 1;
  for (int d = 0; d < kMaxDims - 1; ++d) outer *= step.sizes[d];
  const int64_t begin = outer * task / step.header.tasks, end = outer * (task + 1) / step.header.tasks;
  const bool exact = step.num_instructions == 1 && step.instructions[0].code == 0 && step.out.dtype != 0 &&
                     step.out.dtype == step.inputs[0].dtype;
  for (int64_t index = begin; index < end; ++index) {
    int64_t at[kMaxInputs + 1] = {};
    int64_t rest = index;
    for (int d = kMaxDims - 2; d >= 0; --d) {
      const int64_t i = rest % step.sizes[d];
      rest /= step.sizes[d];
      at[kMaxInputs] += i * step.out.strides[d];
      for (int64_t k = 0; k < step.num_inputs; ++k) at[k] += i * step.inputs[k].strides[d];
    }
    if (exact) {
      const int64_t size = kSizes[step.out.dtype];
      copy_run(slots.at<char>(step.inputs[0].at) + at[0] * size, step.inputs[0].strides[kMaxDims - 1], size, inner,
               slots.at<char>(step.out.at) + at[kMaxInputs] * size, step.out.strides[kMaxDims - 1]);
      continue;
    }
    for (int64_t run = 0; run < inner; run += kRun) {
      const int64_t n = std::min(kRun, inner - run);
      for (int64_t k = 0; k < step.num_inputs; ++k) {
        const Strided& in = step.inputs[k];
        const int64_t stride = in.strides[kMaxDims - 1];
        read_run(slots.at<char>(in.at) + (at[k] + run * stride) * kSizes[in.dtype], in.dtype, stride, n, registers[k]);
      }
      int64_t last = 0;
      for (int64_t k = 0; k < step.num_instructions; ++k) {
        const auto& instruction = step.instructions[k];
        last = step.num_inputs + k;
        instruct(static_cast<Opcode>(instruction.code & 0xffff), registers[instruction.code >> 16 & 0xffff],
                 registers[instruction.code >> 32 & 0xffff], static_cast<float>(instruction.immediate), n,
                 registers[last]);
      }
      const int64_t stride = step.out.strides[kMaxDims - 1];
      write_run(registers[last], step.out.dtype, stride, n,
                slots.at<char>(step.out.at) + (at[kMaxInputs] + run * stride) * kSizes[step.out.dtype]);
    }
  }
}
