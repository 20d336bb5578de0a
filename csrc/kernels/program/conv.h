// Convolution: lines of the input are brought into contiguous memory (normalised and activated on the way), then tiles
// of P pixels by N vectors of output channels are summed in registers over panels of weights that stay in the
// first-level cache.

constexpr int64_t kPanelBytes = 16384;

// What one task of a convolution works on: some lines of some rows of one member.
struct ConvTask {
  int64_t member, row0, rows, y0, lines;
  int64_t block0, blocks;
  int64_t channels;            // C_in
  int64_t units;               // 32-bit values of a pixel: channels, or pairs of bfloat16 channels
  const float* const* pixels;  // first tap of every output pixel
  const int64_t* taps;         // offset of every tap from it
  int64_t num_taps, num_pixels;
  float* sums;  // [pixels, vectors * 16]
};

// The rows of chunk `index` of `chunks`: each member's are cut by themselves. The last chunk takes what is left.
FASTENS_INLINE void cut_rows(const Conv& step, const Slots& slots, int64_t index, int64_t chunks, ConvTask& task) {
  const int64_t each = step.rows_per_member, runs = step.rows / each;
  const bool last = index == chunks - 1;
  for (int64_t begin = 0, end; begin < runs; begin = end) {
    end = end_of_member(slots, step.members, begin, runs);
    const int64_t own = (end - begin) * each, pieces = (own + step.row_chunk - 1) / step.row_chunk;
    if (index < pieces) {
      const int64_t within = index * step.row_chunk;
      task.row0 = begin * each + within;
      task.rows = last ? step.rows - task.row0 : std::min(step.row_chunk, own - within);
      return;
    }
    index -= pieces;
  }
}

FASTENS_INLINE ConvTask conv_task(const Conv& step, const Slots& slots, int64_t index) {
  const int64_t bands = (step.out_h + step.band - 1) / step.band;
  const int64_t width = step.vectors * kLanes;
  const int64_t all_blocks = (step.out_channels + width - 1) / width;
  const int64_t block_tasks = (all_blocks + step.block_chunk - 1) / step.block_chunk;
  ConvTask task{};
  task.block0 = index % block_tasks * step.block_chunk;
  task.blocks = std::min(step.block_chunk, all_blocks - task.block0);
  index /= block_tasks;
  task.y0 = index % bands * step.band;
  task.lines = std::min(step.band, step.out_h - task.y0);
  cut_rows(step, slots, index / bands, step.header.tasks / (block_tasks * bands), task);
  task.channels = step.sources[0].channels + step.sources[1].channels;
  task.units = step.bfloat16 ? task.channels / 2 : task.channels;
  task.num_taps = step.kernel_h * step.kernel_w;
  return task;
}

// The input lines of the task, padded: [row][line][x][C_in].
FASTENS_INLINE void fill_patch(const Conv& step, const Slots& slots, const ConvTask& task, int64_t patch_h,
                               int64_t patch_w, float* patch) {
  const Inlet inlet{step.sources, slots.at(step.table_scale), slots.at(step.table_shift),
                    static_cast<Activation>(step.act_in), &step.mask_in};
  for (int64_t r = task.row0; r < task.row0 + task.rows; ++r) {
    for (int64_t line = 0; line < patch_h; ++line) {
      const int64_t y = task.y0 * step.stride_h - step.pad_top + line;
      for (int64_t i = 0; i < patch_w; ++i, patch += task.channels) {
        const int64_t x = i - step.pad_left;
        if (y < 0 || y >= step.in_h || x < 0 || x >= step.in_w) {
          std::memset(patch, 0, task.channels * sizeof(float));
          continue;
        }
        const int64_t from_y = y / step.up, from_x = x / step.up;
        take(inlet, slots, r, from_y, from_x, from_y * (step.in_w / step.up) + from_x, patch);
      }
    }
  }
}

// float32 to bfloat16 in the same memory, rounded to nearest even.
FASTENS_INLINE void to_bfloat16(float* values, int64_t n) {
  uint16_t* const out = reinterpret_cast<uint16_t*>(values);
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + kRegisterLanes <= n; i += kRegisterLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
    std::memcpy(out + i, &rounded, sizeof(rounded));
  }
#endif
  for (; i < n; ++i) {
    float value;
    std::memcpy(&value, values + i, sizeof(value));
    const uint16_t rounded = bfloat16_of(value);
    std::memcpy(out + i, &rounded, sizeof(rounded));
  }
}

// sum + x w, where x and w hold one float32 or two bfloat16 in every lane.
template <bool Pairs>
FASTENS_INLINE Vector multiplied(Vector sum, Vector x, Vector w) {
#ifdef __AVX512BF16__
  if constexpr (Pairs) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
#endif
  return sum + x * w;
}

// Where each output pixel finds its first tap, and the other taps from there; `pixels` is filled up to a whole tile.
FASTENS_INLINE void locate(const Conv& step, const Slots& slots, ConvTask& task, int most, Scratch& scratch) {
  const float** const pixels = scratch.pixels.room<const float*>(task.num_pixels + most);
  int64_t* const taps = scratch.taps.room<int64_t>(task.num_taps);
  const float** next = pixels;
  const bool direct = !step.bfloat16 && task.num_taps == 1 && step.table_scale < 0 && step.act_in == 0 &&
                      step.mask_in.at < 0 && step.sources[1].channels == 0 && step.pad_top == 0 && step.pad_left == 0 &&
                      (step.out_h - 1) * step.stride_h < step.in_h && (step.out_w - 1) * step.stride_w < step.in_w;
  if (direct) {
    for (int64_t r = task.row0; r < task.row0 + task.rows; ++r) {
      for (int64_t y = task.y0; y < task.y0 + task.lines; ++y) {
        for (int64_t x = 0; x < step.out_w; ++x) {
          *next++ = pixel(slots, step.sources[0], r, y * step.stride_h / step.up, x * step.stride_w / step.up);
        }
      }
    }
    taps[0] = 0;
  } else {
    const int64_t patch_h = (task.lines - 1) * step.stride_h + step.kernel_h;
    const int64_t patch_w = (step.out_w - 1) * step.stride_w + step.kernel_w;
    float* const patch = scratch.patch.room(task.rows * patch_h * patch_w * task.channels);
    fill_patch(step, slots, task, patch_h, patch_w, patch);
    if (step.bfloat16) to_bfloat16(patch, task.rows * patch_h * patch_w * task.channels);
    for (int64_t r = 0; r < task.rows; ++r) {
      for (int64_t y = 0; y < task.lines; ++y) {
        for (int64_t x = 0; x < step.out_w; ++x) {
          *next++ = patch + ((r * patch_h + y * step.stride_h) * patch_w + x * step.stride_w) * task.units;
        }
      }
    }
    for (int64_t t = 0; t < task.num_taps; ++t) {
      taps[t] = (t / step.kernel_w * patch_w + t % step.kernel_w) * task.units;
    }
  }
  std::fill_n(next, most, next[-1]);
  task.pixels = pixels;
  task.taps = taps;
}

// A panel of weights: taps of all units of the channels, or some units of one tap.
struct Panel {
  int64_t tap_begin, tap_end, unit_begin, unit_end;
  const float* weight;
};

// sums [P, width] of P pixels, N registers of each: from zero, or onto what is there.
template <int P, int N, bool Pairs>
FASTENS_INLINE void tile(const float* const* pixels, const int64_t* taps, const Panel& panel, const float* weight,
                         int64_t width, float* sums, bool first) {
  Vector acc[P][N];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[p][n] = first ? Vector{} : load(sums + p * width + n * kRegisterLanes);
  }
  for (int64_t tap = panel.tap_begin; tap < panel.tap_end; ++tap) {
    const float* x[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) x[p] = pixels[p] + taps[tap];
    for (int64_t c = panel.unit_begin; c < panel.unit_end; ++c, weight += width) {
      Vector w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[n] = load(weight + n * kRegisterLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Vector value = splat(x[p][c]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[p][n] = multiplied<Pairs>(acc[p][n], value, w[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums + p * width + n * kRegisterLanes, acc[p][n]);
  }
}

// Sums of W vectors of channels, in tiles of P pixels by N registers.
template <int P, int N, int W, bool Pairs>
FASTENS_INLINE void sum_panels(const ConvTask& task, const float* weight) {
  const int64_t width = W * kLanes, most = std::max<int64_t>(1, kPanelBytes / (width * 4));  // weights of a panel
  Panel panel{0, 0, 0, task.units, weight};
  const int64_t whole_taps = most / task.units;
  for (int64_t tap = 0; tap < task.num_taps; tap = panel.tap_end) {
    panel.tap_begin = tap;
    panel.tap_end = std::min(task.num_taps, tap + std::max<int64_t>(1, whole_taps));
    const int64_t step = whole_taps ? task.units : most;
    for (int64_t c = 0; c < task.units; c = panel.unit_end) {
      panel.unit_begin = c;
      panel.unit_end = std::min(task.units, c + step);
      const bool first = tap == 0 && c == 0;
      for (int64_t i = 0; i < task.num_pixels; i += P) {
        for (int64_t lane = 0; lane < width; lane += N * kRegisterLanes) {
          tile<P, N, Pairs>(task.pixels + i, task.taps, panel, panel.weight + lane, width, task.sums + i * width + lane,
                            first);
        }
      }
      panel.weight += (panel.tap_end - panel.tap_begin) * (panel.unit_end - c) * width;
    }
  }
}

template <int P, int N, int W = N>
FASTENS_INLINE void sum_block([[maybe_unused]] const Conv& step, const ConvTask& task, const float* weight) {
#ifdef __AVX512BF16__
  if (step.bfloat16) {
    sum_panels<P, N, W, true>(task, weight);
    return;
  }
#endif
  sum_panels<P, N, W, false>(task, weight);
}

// What is done to the sums of a row's pixels before they are stored.
struct Finish {
  const float *bias, *added;
  float mask_scale, scale, divisor;
  Activation activation;
};

FASTENS_INLINE Finish finish_of(const Conv& step, const Slots& slots, int64_t member, int64_t row) {
  const float *const bias = slots.at(step.bias), *const row_vector = slots.at(step.row_vector);
  return {bias ? bias + member * step.bias_member : nullptr,
          row_vector ? row_vector + row * step.row_vector_row : nullptr,
          static_cast<float>(step.mask_out.scale),
          static_cast<float>(step.scale),
          static_cast<float>(step.divisor),
          static_cast<Activation>(step.act_out)};
}

// Bias, row vector, mask, residual, scale, divisor and activation of a register of channels from c, of which `left`
// exist.
FASTENS_INLINE void finish(const Finish& how, Vector v, int64_t c, int64_t left, const uint16_t* words,
                           const float* residual, float* out) {
  if (how.bias) v += load(how.bias + c);
  if (how.added) v += load_some(how.added + c, left);
  if (words) v = masked(v, words, c, how.mask_scale);
  if (residual) v += load_some(residual + c, left);
  if (how.scale != 1.0f) v *= how.scale;
  if (how.divisor != 1.0f) v /= how.divisor;  // a product with 1 / divisor has another last bit
  store_some(out + c, activated(v, how.activation), left);
}

// The sums of `vectors` vectors of channels from `channel0`, every pixel.
FASTENS_INLINE void finish_block(const Conv& step, const Slots& slots, const ConvTask& task, int64_t vectors,
                                 int64_t channel0) {
  const float* sums = task.sums;
  const int64_t end = std::min(step.out_channels, channel0 + vectors * kLanes);
  for (int64_t r = task.row0; r < task.row0 + task.rows; ++r) {
    const Finish how = finish_of(step, slots, task.member, r);
    for (int64_t y = task.y0; y < task.y0 + task.lines; ++y) {
      for (int64_t x = 0; x < step.out_w; ++x) {
        const float* const residual = step.residual.at < 0 ? nullptr : pixel(slots, step.residual, r, y, x);
        float* const out = const_cast<float*>(pixel(slots, step.out, r, y, x));
        const uint16_t* const words = mask_words(slots, step.mask_out, r, y * step.out_w + x);
        for (int64_t c = channel0; c < end; c += kRegisterLanes) {
          finish(how, load(sums + c - channel0), c, step.out_channels - c, words, residual, out);
        }
        sums += vectors * kLanes;
      }
    }
  }
}

FASTENS_INLINE int64_t padded(int64_t n, int64_t tile) { return (n + tile - 1) / tile * tile; }

// The sums of `vectors` vectors of channels, every pixel.
static void sum_vectors(const Conv& step, const ConvTask& task, int64_t vectors, const float* weight) {
#if FASTENS_REGISTER_BYTES == 64
  const int64_t n = task.num_pixels;
  // The larger tile loads less, the smaller one wastes less where few pixels are left over.
  switch (vectors) {
    case 1:
      if (padded(n, 12) <= padded(n, 6)) {
        sum_block<12, 1>(step, task, weight);
      } else {
        sum_block<6, 1>(step, task, weight);
      }
      break;
    case 2:
      if (padded(n, 12) <= padded(n, 8)) {
        sum_block<12, 2>(step, task, weight);
      } else {
        sum_block<8, 2>(step, task, weight);
      }
      break;
    case 3:
      if (padded(n, 8) <= padded(n, 4)) {
        sum_block<8, 3>(step, task, weight);
      } else {
        sum_block<4, 3>(step, task, weight);
      }
      break;
    default:
      if (padded(n, 6) <= padded(n, 4)) {
        sum_block<6, 4>(step, task, weight);
      } else {
        sum_block<4, 4>(step, task, weight);
      }
  }
#else
  constexpr int kRegisters = kLanes / kRegisterLanes;  // of a vector of channels: some pixels' sums fill what there are
  constexpr int kPixels = (FASTENS_REGISTERS - kRegisters) / kRegisters / 2 * 2;
  switch (vectors) {
    case 1:
      return sum_block<kPixels, kRegisters, 1>(step, task, weight);
    case 2:
      return sum_block<kPixels, kRegisters, 2>(step, task, weight);
    case 3:
      return sum_block<kPixels, kRegisters, 3>(step, task, weight);
    default:
      return sum_block<kPixels, kRegisters, 4>(step, task, weight);
  }
#endif
}

// The rows of a task that belong to one member.
FASTENS_INLINE void convolve(const Conv& step, const Slots& slots, ConvTask& task, Scratch& scratch) {
  task.num_pixels = task.rows * task.lines * step.out_w;
  locate(step, slots, task, 12, scratch);
  const int64_t n = task.num_pixels, width = step.vectors * kLanes;
  task.sums = scratch.sums.room((n + 12) * width);
  for (int64_t b = task.block0; b < task.block0 + task.blocks; ++b) {
    const int64_t channel0 = b * width;
    const int64_t vectors = std::min(step.vectors, (step.out_channels - channel0 + kLanes - 1) / kLanes);
    const float* const weight =
        slots.at(step.weight) + task.member * step.weight_member + channel0 * task.num_taps * task.units;
    sum_vectors(step, task, vectors, weight);
    finish_block(step, slots, task, vectors, channel0);
  }
}

// Convolves a task by `Convolve`, the rows of one member after those of another.
template <void (*Convolve)(const Conv&, const Slots&, ConvTask&, Scratch&)>
FASTENS_INLINE void run_conv(const Conv& step, const Slots& slots, int64_t index, Scratch& scratch) {
  ConvTask task = conv_task(step, slots, index);
  const int64_t end = task.row0 + task.rows;
  for (int64_t row = task.row0; row < end;) {
    task.row0 = row;
    task.member = member_of(slots, step.members, step.rows_per_member, row);
    while (++row < end && member_of(slots, step.members, step.rows_per_member, row) == task.member) {
    }
    task.rows = row - task.row0;
    Convolve(step, slots, task, scratch);
  }
}
