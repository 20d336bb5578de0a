// Group normalisation as a scale and a shift per channel, and layer normalisation.

constexpr int64_t kPixelsInFloat = 64;  // summed in float32 before they are added up in float64

// One row, or a share of its groups: mean, then the variance around it, both summed per channel first.
FASTENS_INLINE void run_norm(const Norm& step, const Slots& slots, int64_t index, Scratch& scratch) {
  const int64_t r = index / step.splits, split = index % step.splits;
  const int64_t member = member_of(slots, step.members, step.rows_per_member, r);
  const int64_t channels = step.sources[0].channels + step.sources[1].channels, size = channels / step.groups;
  const int64_t group0 = step.groups * split / step.splits, group1 = step.groups * (split + 1) / step.splits;
  const int64_t begin = group0 * size, end = group1 * size, pixels = step.height * step.width;
  float* const sums = scratch.sums.room(2 * (channels + kRegisterLanes));
  float* const mean = sums + (channels + kRegisterLanes);
  double* const totals = scratch.totals.room<double>(channels);
  for (int pass = 0; pass < 2; ++pass) {
    std::fill_n(totals, channels, 0.0);
    for (int64_t y = 0; y < step.height; ++y) {
      for (int64_t x0 = 0; x0 < step.width; x0 += kPixelsInFloat) {
        std::fill_n(sums, channels, 0.0f);
        for (int64_t x = x0; x < std::min(step.width, x0 + kPixelsInFloat); ++x) {
          for (int s = 0; s < 2; ++s) {
            const Image& source = step.sources[s];
            const int64_t offset = s ? step.sources[0].channels : 0;
            const int64_t from = std::max(begin, offset), to = std::min(end, offset + source.channels);
            if (from >= to) continue;
            const float* const in = pixel(slots, source, r, y, x) - offset;
            if (pass == 0) {
              for (int64_t c = from; c < to; ++c) sums[c] += in[c];
            } else {
              for (int64_t c = from; c < to; ++c) sums[c] += (in[c] - mean[c]) * (in[c] - mean[c]);
            }
          }
        }
        for (int64_t c = begin; c < end; ++c) totals[c] += sums[c];
      }
    }
    for (int64_t g = group0; g < group1; ++g) {
      double total = 0;
      for (int64_t c = g * size; c < (g + 1) * size; ++c) total += totals[c];
      total /= static_cast<double>(pixels * size);
      if (pass == 0) {
        std::fill_n(mean + g * size, size, static_cast<float>(total));
      } else {
        std::fill_n(sums + g * size, size, static_cast<float>(1.0 / std::sqrt(total + step.eps)));
      }
    }
  }
  const float *weight = slots.at(step.weight), *bias = slots.at(step.bias);
  const float *row_scale = slots.at(step.row_scale), *row_shift = slots.at(step.row_shift);
  float* const out_scale = slots.at(step.out_scale) + r * channels;
  float* const out_shift = slots.at(step.out_shift) + r * channels;
  for (int64_t c = begin; c < end; ++c) {
    float a = sums[c], b = -mean[c] * sums[c];
    if (weight) a *= weight[member * channels + c], b *= weight[member * channels + c];
    if (bias) b += bias[member * channels + c];
    if (row_scale) {
      const float factor = 1.0f + row_scale[r * step.row_scale_row + c];
      a *= factor, b *= factor;
    }
    if (row_shift) b += row_shift[r * step.row_shift_row + c];
    out_scale[c] = a, out_shift[c] = b;
  }
}

FASTENS_INLINE void run_layer_norm(const LayerNorm& step, const Slots& slots, int64_t index) {
  const int64_t r = index, n = step.channels, member = member_of(slots, step.members, step.rows_per_member, r);
  const float *weight = slots.at(step.weight), *bias = slots.at(step.bias);
  const float *row_scale = slots.at(step.row_scale), *row_shift = slots.at(step.row_shift);
  if (weight) weight += member * n;
  if (bias) bias += member * n;
  if (row_scale) row_scale += r * step.row_scale_row;
  if (row_shift) row_shift += r * step.row_shift_row;
  for (int64_t t = 0; t < step.tokens; ++t) {
    const float* const in = slots.at(step.source) + r * step.source_row + t * step.source_token;
    float* const out = slots.at(step.out) + r * step.out_row + t * step.out_token;
    Vector total{};
    for (int64_t c = 0; c < n; c += kRegisterLanes) total += load_some(in + c, n - c);
    const float mean = sum(total) / static_cast<float>(n);
    // Around the rounded mean; what that leaves of the mean, which counts where values are far from 0, comes off below.
    Vector rests{}, squares{};
    int64_t c = 0;
    for (; c + kRegisterLanes <= n; c += kRegisterLanes) {
      const Vector d = load(in + c) - mean;
      rests += d, squares += d * d;
    }
    float rest = sum(rests), square = sum(squares);
    for (; c < n; ++c) {
      const float d = in[c] - mean;
      rest += d, square += d * d;
    }
    rest /= static_cast<float>(n);
    const float variance = std::max(0.0f, square / static_cast<float>(n) - rest * rest);
    const float rate = 1.0f / std::sqrt(variance + static_cast<float>(step.eps));
    for (c = 0; c < n; c += kRegisterLanes) {
      const int64_t left = n - c;
      Vector v = (load_some(in + c, left) - mean - rest) * rate;
      if (weight) v *= load_some(weight + c, left);
      if (bias) v += load_some(bias + c, left);
      if (row_scale) v *= 1.0f + load_some(row_scale + c, left);
      if (row_shift) v += load_some(row_shift + c, left);
      store_some(out + c, v, left);
    }
  }
}
