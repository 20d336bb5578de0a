// 3x3 convolution of stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308): of a square of the
// input a pixels a side, a = m + 2, come m x m pixels of the output: A^T (G g G^T * B^T d B) A. The products of all
// squares and channels are a^2 matrix products. Weights are packed as G g G^T (fastens/program/winograd.py).

constexpr int64_t kSpreadBytes = 640 * 1024;  // transformed input that stays in the second-level cache

// One dimension of the transforms, for tiles of M pixels of the output.
template <int M>
struct Winograd;

// The points 0, 1, -1 and infinity.
template <>
struct Winograd<2> {
  static FASTENS_INLINE void input(const Vector* d, Vector* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static FASTENS_INLINE void output(const Vector* s, Vector* y) {
    y[0] = s[0] + s[1] + s[2];
    y[1] = s[1] - s[2] - s[3];
  }
};

// The points 0, +-sqrt(1/2), +-sqrt(2) and infinity: a quarter of the error of 0, +-1, +-2.
template <>
struct Winograd<4> {
  static constexpr float kLow = 0.70710678f, kHigh = 1.41421356f;
  static FASTENS_INLINE void input(const Vector* d, Vector* v) {
    v[0] = d[0] - 2.5f * d[2] + d[4];
    const Vector even_low = d[4] - 2.0f * d[2], odd_low = kLow * (d[3] - 2.0f * d[1]);
    const Vector even_high = d[4] - 0.5f * d[2], odd_high = kHigh * (d[3] - 0.5f * d[1]);
    v[1] = even_low + odd_low;
    v[2] = even_low - odd_low;
    v[3] = even_high + odd_high;
    v[4] = even_high - odd_high;
    v[5] = d[1] - 2.5f * d[3] + d[5];
  }
  static FASTENS_INLINE void output(const Vector* s, Vector* y) {
    const Vector even_low = s[1] + s[2], odd_low = kLow * (s[1] - s[2]);
    const Vector even_high = s[3] + s[4], odd_high = kHigh * (s[3] - s[4]);
    y[0] = s[0] + even_low + even_high;
    y[1] = odd_low + odd_high;
    y[2] = 0.5f * even_low + 2.0f * even_high;
    y[3] = 0.5f * odd_low + 2.0f * odd_high + s[5];
  }
};

// One square after the other, along the lines of squares of one row after the next.
struct Square {
  int64_t across, lines;  // of a row: squares in a line, lines of squares
  int64_t row = 0, y = 0, x = 0;

  FASTENS_INLINE void advance() {
    if (++x < across) return;
    x = 0;
    if (++y < lines) return;
    y = 0;
    ++row;
  }
};

// B^T d B of the channels of a square, a register at a time: `from` is its first pixel in the patch, `to` the first of
// a^2 places `step` apart.
template <int M>
FASTENS_INLINE void spread(const float* from, int64_t line, int64_t channels, float* to, int64_t step) {
  constexpr int A = M + 2;
  for (int64_t c = 0; c < channels; c += kRegisterLanes) {
    Vector half[A][A];  // [x][y]
#pragma GCC unroll 6
    for (int x = 0; x < A; ++x) {
      Vector d[A];
#pragma GCC unroll 6
      for (int y = 0; y < A; ++y) d[y] = load(from + y * line + x * channels + c);
      Winograd<M>::input(d, half[x]);
    }
#pragma GCC unroll 6
    for (int y = 0; y < A; ++y) {
      Vector d[A], v[A];
#pragma GCC unroll 6
      for (int x = 0; x < A; ++x) d[x] = half[x][y];
      Winograd<M>::input(d, v);
#pragma GCC unroll 6
      for (int x = 0; x < A; ++x) store(to + (y * A + x) * step + c, v[x]);
    }
  }
}

// A^T s A of a register of channels: s in a^2 places `step` apart, the result as M lines of M pixels.
template <int M>
FASTENS_INLINE void gathered(const float* sums, int64_t step, Vector (&result)[M][M]) {
  constexpr int A = M + 2;
  Vector half[A][M];  // [x][y]
#pragma GCC unroll 6
  for (int x = 0; x < A; ++x) {
    Vector s[A];
#pragma GCC unroll 6
    for (int y = 0; y < A; ++y) s[y] = load(sums + (y * A + x) * step);
    Winograd<M>::output(s, half[x]);
  }
#pragma GCC unroll 6
  for (int y = 0; y < M; ++y) {
    Vector s[A];
#pragma GCC unroll 6
    for (int x = 0; x < A; ++x) s[x] = half[x][y];
    Winograd<M>::output(s, result[y]);
  }
}

// The output of the squares whose sums these are, in `vectors` vectors of channels from `channel0`.
template <int M>
FASTENS_INLINE void finish_squares(const Conv& step, const Slots& slots, const ConvTask& task, Square square,
                                   int64_t vectors, int64_t channel0, int64_t place) {
  const float* sums = task.sums;
  const int64_t end = std::min(step.out_channels, channel0 + vectors * kLanes);
  for (int64_t i = 0; i < task.num_pixels; ++i, square.advance(), sums += vectors * kLanes) {
    const int64_t r = task.row0 + square.row, y0 = task.y0 + square.y * M, x0 = square.x * M;
    const int64_t height = std::min<int64_t>(M, task.y0 + task.lines - y0);
    const int64_t width = std::min<int64_t>(M, step.out_w - x0);
    const Finish how = finish_of(step, slots, task.member, r);
    float* const out = const_cast<float*>(pixel(slots, step.out, r, y0, x0));
    const float* const residual = step.residual.at < 0 ? nullptr : pixel(slots, step.residual, r, y0, x0);
    const uint16_t* const mask = mask_words(slots, step.mask_out, r, y0 * step.out_w + x0);
    for (int64_t c = channel0; c < end; c += kRegisterLanes) {
      Vector result[M][M];
      gathered<M>(sums + c - channel0, place, result);
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          const float* const added = residual ? residual + y * step.residual.y + x * step.residual.x : nullptr;
          const uint16_t* const words = mask ? mask + (y * step.out_w + x) * step.mask_out.pixel : nullptr;
          finish(how, result[y][x], c, step.out_channels - c, words, added, out + y * step.out.y + x * step.out.x);
        }
      }
    }
  }
}

// The rows of a task that belong to one member, in tiles of M pixels a side.
template <int M>
FASTENS_INLINE void convolve_squares(const Conv& step, const Slots& slots, ConvTask& task, Scratch& scratch) {
  constexpr int64_t kPlaces = (M + 2) * (M + 2);
  const int64_t channels = task.channels, width = step.vectors * kLanes;
  Square square{(step.out_w + M - 1) / M, (task.lines + M - 1) / M};
  const int64_t total = task.rows * square.lines * square.across;
  const int64_t patch_h = square.lines * M + 2, patch_w = square.across * M + 2, line = patch_w * channels;
  float* const patch = scratch.patch.room(task.rows * patch_h * line);
  fill_patch(step, slots, task, patch_h, patch_w, patch);

  const int64_t stride = padded(channels, kLanes) + kLanes;  // of a square's channels; no power of two
  const int64_t most = std::max<int64_t>(12, kSpreadBytes / (kPlaces * stride * 4) / 12 * 12);
  const int64_t parts = (total + most - 1) / most, part = (total + parts - 1) / parts;
  float* const values = scratch.spread.room(kPlaces * part * stride);
  task.sums = scratch.sums.room(kPlaces * (part + 12) * width);
  const float** const pixels = scratch.pixels.room<const float*>(part + 12);
  int64_t* const taps = scratch.taps.room<int64_t>(1);
  task.pixels = pixels;
  task.taps = taps;
  task.num_taps = 1;
  for (int64_t first = 0; first < total; first += part) {
    const int64_t count = task.num_pixels = std::min(part, total - first);
    const Square begin = square;
    for (int64_t i = 0; i < count; ++i, square.advance()) {
      const float* const from = patch + (square.row * patch_h + square.y * M) * line + square.x * M * channels;
      spread<M>(from, line, channels, values + i * stride, count * stride);
      pixels[i] = values + i * stride;
    }
    std::fill_n(pixels + count, 12, pixels[count - 1]);
    for (int64_t b = task.block0; b < task.block0 + task.blocks; ++b) {
      const int64_t channel0 = b * width;
      const int64_t vectors = std::min(step.vectors, (step.out_channels - channel0 + kLanes - 1) / kLanes);
      const int64_t place = (count + 12) * vectors * kLanes;  // of the sums of one product
      const float* const weight =
          slots.at(step.weight) + task.member * step.weight_member + channel0 * kPlaces * channels;
      ConvTask product = task;
      for (int64_t p = 0; p < kPlaces; ++p, product.sums += place) {
        taps[0] = p * count * stride;
        sum_vectors(step, product, vectors, weight + p * channels * vectors * kLanes);
      }
      finish_squares<M>(step, slots, task, begin, vectors, channel0, place);
    }
  }
}

FASTENS_INLINE void convolve_winograd(const Conv& step, const Slots& slots, ConvTask& task, Scratch& scratch) {
  if (static_cast<const program::Winograd&>(step).tile == 4) {
    convolve_squares<4>(step, slots, task, scratch);
  } else {
    convolve_squares<2>(step, slots, task, scratch);
  }
}
