// Reading the channels of one pixel: joined from two sources, enlarged, normalised and activated.

FASTENS_INLINE const float* pixel(const Slots& slots, const Image& image, int64_t row, int64_t y, int64_t x) {
  return slots.at(image.at) + (row % image.rows) * image.row + y * image.y + x * image.x;
}

// to = act(from * scale + shift), n channels; without scale, act(from).
FASTENS_INLINE void transformed(const float* from, const float* scale, const float* shift, Activation activation,
                                int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += kRegisterLanes) {
    const int64_t left = n - c;
    Vector v = load_some(from + c, left);
    if (scale) v = v * load_some(scale + c, left) + load_some(shift + c, left);
    store_some(to + c, activated(v, activation), left);
  }
}
