// Reading the channels of one pixel: joined from two sources, enlarged, normalised and activated.

FASTENS_INLINE const float* pixel(const Slots& slots, const Image& image, int64_t row, int64_t y, int64_t x) {
  return slots.at(image.at) + (row % image.rows) * image.row + y * image.y + x * image.x;
}

// The words of a mask for one pixel of a row, none where there is no mask.
FASTENS_INLINE const uint16_t* mask_words(const Slots& slots, const Mask& mask, int64_t row, int64_t pixel) {
  if (mask.at < 0) return nullptr;
  const int64_t which = member_of(slots, mask.members, mask.rows, row);
  return slots.at<const uint16_t>(mask.at) + which * mask.row + pixel * mask.pixel;
}

// x * (bit ? scale : 0), lane by lane: channels from c on, a word having the bits of 16.
FASTENS_INLINE Vector masked(Vector x, const uint16_t* words, int64_t c, float scale) {
  alignas(64) static constexpr int32_t kBits[] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                  1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const IntVector lanes = *reinterpret_cast<const IntVector*>(kBits + c % kLanes);
  const IntVector bits = (words[c / kLanes] - IntVector{}) & lanes;
  return x * (bits != 0 ? splat(scale) : Vector{});
}

// to = act(from * scale + shift) * mask, n channels; without scale, act(from); without words, nothing is masked.
FASTENS_INLINE void transformed(const float* from, const float* scale, const float* shift, Activation activation,
                                const uint16_t* words, float mask_scale, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += kRegisterLanes) {
    const int64_t left = n - c;
    Vector v = load_some(from + c, left);
    if (scale) v = v * load_some(scale + c, left) + load_some(shift + c, left);
    v = activated(v, activation);
    if (words) v = masked(v, words, c, mask_scale);
    store_some(to + c, v, left);
  }
}

// What a pixel's channels are made of on the way into a step: up to two images, with tables, activation and mask.
struct Inlet {
  const Image* sources;
  const float *table_scale, *table_shift;
  Activation activation;
  const Mask* mask;
};

// One pixel of a row, all channels: at (y, x) of the sources, the mask's pixel given by its number.
FASTENS_INLINE void take(const Inlet& inlet, const Slots& slots, int64_t row, int64_t y, int64_t x, int64_t number,
                         float* to) {
  const uint16_t* const words = mask_words(slots, *inlet.mask, row, number);
  const int64_t first = inlet.sources[0].channels, channels = first + inlet.sources[1].channels;
  for (int s = 0; s < 2; ++s) {
    const Image& source = inlet.sources[s];
    if (source.channels == 0) continue;
    const int64_t offset = s ? first : 0, table = row * channels + offset;
    transformed(pixel(slots, source, row, y, x), inlet.table_scale ? inlet.table_scale + table : nullptr,
                inlet.table_scale ? inlet.table_shift + table : nullptr, inlet.activation,
                words ? words + offset / kLanes : nullptr, static_cast<float>(inlet.mask->scale), source.channels,
                to + offset);
  }
}
