// fastens::_conv_native: each member's rows convolved with its own kernels, by the step of a program.
//
// The kernels are packed in every call, because their values may have changed since the last one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "check.h"
#include "run_program.h"

namespace fastens {
namespace {

using program::Conv;
using program::kLanes;

using program::kPatchBytes;
using program::kTasksPerThread;

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Images [R, C, H, W], or lines [R, C, W].
struct Images {
  int64_t rows, channels, height, width;

  explicit Images(const Tensor& x)
      : rows(x.size(0)), channels(x.size(1)), height(x.dim() == 4 ? x.size(2) : 1), width(x.size(x.dim() - 1)) {}
  int64_t pixels() const { return height * width; }
  int64_t row() const { return channels * pixels(); }
};

bool is_channels_last(const Tensor& x) {
  const Images of(x);
  const auto strides = x.strides();
  const bool lines = of.height == 1 || strides[2] == of.width * of.channels;
  return (of.channels == 1 || strides[1] == 1) && lines && (of.width == 1 || strides[x.dim() - 1] == of.channels) &&
         (of.rows == 1 || strides[0] == of.row());
}

// [R, n, m] to [R, m, n].
void transposed(const float* from, float* to, int64_t rows, int64_t n, int64_t m) {
  constexpr int64_t kTile = 16;
  const int64_t tiles = over(n, kTile);
  torch::stable::parallel_for(0, rows * tiles, over(int64_t{1} << 14, kTile * m + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kTile, last = std::min(n, first + kTile);
      const float* const source = from + i / tiles * n * m;
      float* const target = to + i / tiles * n * m;
      for (int64_t b = 0; b < m; ++b) {
        for (int64_t a = first; a < last; ++a) target[b * n + a] = source[a * m + b];
      }
    }
  });
}

// Kernels [K, C_out, C_in, taps] as the step reads them: [K][block][tap][C_in][16 vectors], zeros up to whole vectors.
void pack(const float* weight, float* packed, int64_t members, int64_t outputs, int64_t inputs, int64_t taps,
          int64_t vectors) {
  const int64_t width = vectors * kLanes, blocks = over(outputs, width);
  const int64_t member = over(outputs, kLanes) * kLanes * inputs * taps;
  const auto block = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / blocks, first = i % blocks * width, count = std::min(width, outputs - first);
      const int64_t lanes = over(count, kLanes) * kLanes;  // of the last block fewer
      const float* const source = weight + (k * outputs + first) * inputs * taps;
      float* const target = packed + k * member + first * inputs * taps;
      for (int64_t c = 0; c < inputs; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          float* const to = target + (tap * inputs + c) * lanes;
          const float* const at = source + c * taps + tap;
          for (int64_t o = 0; o < count; ++o) to[o] = at[o * inputs * taps];
          std::fill(to + count, to + lanes, 0.0f);
        }
      }
    }
  };
  torch::stable::parallel_for(0, members * blocks, over(int64_t{1} << 13, width * inputs * taps), block);
}

// How the convolution is cut into tasks, as plans cut theirs: first as much input as fits the cache, then enough tasks
// for the threads.
void cut(Conv& step, int64_t members, int64_t num_threads) {
  const int64_t total = over(step.out_channels, kLanes);
  step.vectors = total == 3 ? 3 : total == 1 ? 1 : 2;
  const int64_t blocks = over(total, step.vectors);
  const int64_t groups = std::min(members, step.rows), own = over(step.rows, groups);  // about, where rows are given
  const int64_t line =
      ((step.out_w - 1) * step.stride_w + step.kernel_w) * step.sources[0].channels * int64_t{sizeof(float)};
  const auto patch = [&](int64_t lines) { return ((lines - 1) * step.stride_h + step.kernel_h) * line; };
  step.band = step.out_h;
  while (step.band > 1 && patch(step.band) > kPatchBytes) step.band = over(step.band, 2);
  const bool whole = step.band == step.out_h;
  step.row_chunk = whole ? std::clamp(kPatchBytes / patch(step.band), int64_t{1}, own) : 1;
  step.block_chunk = blocks;
  const auto tasks = [&] {
    return groups * over(own, step.row_chunk) * over(step.out_h, step.band) * over(blocks, step.block_chunk);
  };
  const int64_t wanted = num_threads > 1 ? kTasksPerThread * num_threads : 1;
  while (step.row_chunk > 1 && tasks() < wanted) step.row_chunk = over(step.row_chunk, 2);
  while (step.block_chunk > 1 && tasks() < wanted) step.block_chunk = over(step.block_chunk, 2);
  while (step.band > 4 && tasks() < wanted) step.band = over(step.band, 2);
  const int64_t most = step.members < 0 ? groups * over(own, step.row_chunk)
                                        : (step.rows + groups * (step.row_chunk - 1)) / step.row_chunk;
  step.header.tasks = most * over(step.out_h, step.band) * over(blocks, step.block_chunk);
}

std::vector<int64_t> members_of_rows(const Tensor& offsets, int64_t rows) {
  std::vector<int64_t> members(rows);
  const Tensor dense = torch::stable::contiguous(offsets);
  const int64_t* const starts = static_cast<const int64_t*>(dense.data_ptr());
  for (int64_t k = 0; k + 1 < offsets.size(0); ++k) {
    STD_TORCH_CHECK(0 <= starts[k] && starts[k] <= starts[k + 1] && starts[k + 1] <= rows,
                    "conv: `offsets` does not rise from 0 to the ", rows, " rows");
    std::fill(members.begin() + starts[k], members.begin() + starts[k + 1], k);
  }
  return members;
}

Tensor conv(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
            std::vector<int64_t> padding, std::vector<int64_t> dilation, bool is_transposed, std::vector<int64_t>,
            int64_t groups, std::optional<Tensor> offsets) {
  const bool ones = std::all_of(dilation.begin(), dilation.end(), [](int64_t d) { return d == 1; });
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float,
                  "conv: the native kernel takes float32");
  STD_TORCH_CHECK(
      (x.dim() == 3 || x.dim() == 4) && weight.dim() == x.dim() + 1 && ones && !is_transposed && groups == 1,
      "conv: the native kernel takes plain convolutions in one or two dimensions");
  const Images in(x);
  const bool image = x.dim() == 4;
  const int64_t members = weight.size(0), outputs = weight.size(1);
  STD_TORCH_CHECK(in.channels > 0, "conv: the native kernel takes one channel or more");
  Conv step{};
  step.header.kind = static_cast<int64_t>(program::Kind::kConv);
  step.rows = in.rows;
  step.in_h = in.height, step.in_w = in.width;
  step.kernel_h = image ? weight.size(3) : 1, step.kernel_w = weight.size(weight.dim() - 1);
  step.stride_h = image ? stride[0] : 1, step.stride_w = stride.back();
  step.pad_top = image ? padding[0] : 0, step.pad_left = padding.back();
  step.out_h = (in.height + 2 * step.pad_top - step.kernel_h) / step.stride_h + 1;
  step.out_w = (in.width + 2 * step.pad_left - step.kernel_w) / step.stride_w + 1;
  step.out_channels = outputs;
  STD_TORCH_CHECK(in.height + 2 * step.pad_top >= step.kernel_h && in.width + 2 * step.pad_left >= step.kernel_w,
                  "conv: the kernel is larger than the padded input");
  const bool direct = is_channels_last(x), last = image && direct && !x.is_contiguous();
  std::vector<int64_t> size{in.rows, outputs};
  if (image) size.push_back(step.out_h);
  size.push_back(step.out_w);
  Tensor out = last ? torch::stable::empty(size, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
                                           torch::headeronly::MemoryFormat::ChannelsLast)
                    : torch::stable::new_empty(x, size);
  if (out.numel() == 0) return out;

  const Tensor given = direct ? x : torch::stable::contiguous(x);
  const float* input = static_cast<const float*>(given.data_ptr());
  std::vector<float> moved_in, moved_out;
  if (!direct) {
    moved_in.resize(in.rows * in.row());
    transposed(input, moved_in.data(), in.rows, in.channels, in.pixels());
    input = moved_in.data();
  }
  const Images result(out);
  const bool in_place = last || outputs == 1 || result.pixels() == 1;
  if (!in_place) moved_out.resize(result.rows * result.row());

  const int64_t taps = step.kernel_h * step.kernel_w, padded = over(outputs, kLanes) * kLanes;
  const Tensor kernels = torch::stable::contiguous(weight);
  step.rows_per_member = offsets ? 1 : in.rows / members;
  std::vector<int64_t> row_members;
  if (offsets) row_members = members_of_rows(*offsets, in.rows);
  enum : int64_t { kInput, kWeight, kBias, kOutput, kMembers };
  const auto place = [](int64_t slot) { return slot << 48; };
  step.members = offsets ? place(kMembers) : -1;
  step.sources[0] = {place(kInput), in.row(), in.width * in.channels, in.channels, in.channels, in.rows};
  step.sources[1].at = -1;
  step.sources[1].rows = 1;
  step.up = 1;
  step.table_scale = step.table_shift = step.row_vector = step.residual.at = -1;
  step.mask_in.at = step.mask_out.at = -1;
  step.weight = place(kWeight);
  step.weight_member = padded * in.channels * taps;
  step.bias = bias ? place(kBias) : -1;
  step.bias_member = padded;
  step.scale = step.divisor = 1;
  step.out = {place(kOutput), result.row(), result.width * outputs, outputs, outputs, result.rows};
  const int64_t num_threads = torch::stable::get_num_threads();
  cut(step, members, num_threads);

  std::vector<float> packed(members * step.weight_member + kLanes), filled;
  pack(static_cast<const float*>(kernels.data_ptr()), packed.data(), members, outputs, in.channels, taps, step.vectors);
  if (bias) {
    const Tensor dense = torch::stable::contiguous(*bias);
    const float* const values = static_cast<const float*>(dense.data_ptr());
    filled.resize(members * padded);
    for (int64_t k = 0; k < members; ++k) {
      std::copy_n(values + k * outputs, outputs, filled.data() + k * padded);
    }
  }
  float* const output = in_place ? static_cast<float*>(out.data_ptr()) : moved_out.data();
  char* bases[] = {reinterpret_cast<char*>(const_cast<float*>(input)), reinterpret_cast<char*>(packed.data()),
                   reinterpret_cast<char*>(filled.data()), reinterpret_cast<char*>(output),
                   reinterpret_cast<char*>(row_members.data())};
  int64_t words[program::kStepWidth] = {};
  std::memcpy(words, &step, sizeof(step));
  program::run_steps(words, 1, program::Slots{bases}, num_threads);
  if (!in_place) {
    transposed(output, static_cast<float*>(out.data_ptr()), result.rows, result.pixels(), outputs);
  }
  return out;
}

}  // namespace
}  // namespace fastens

STABLE_TORCH_LIBRARY_IMPL(fastens, CPU, m) { m.impl("_conv_native", TORCH_BOX(&fastens::conv)); }
