// Attention over the keys of one row and head, in blocks of queries with an exact softmax per query.

FASTENS_INLINE const float* token(const Slots& slots, const Heads& heads, int64_t row, int64_t head, int64_t t) {
  return slots.at(heads.at) + row * heads.row + head * heads.head + t * heads.token;
}

FASTENS_INLINE void run_attention(const Attention& step, const Slots& slots, int64_t index, Scratch& scratch) {
  const int64_t chunks = (step.queries + step.query_chunk - 1) / step.query_chunk;
  const int64_t chunk = index % chunks, head = index / chunks % step.heads, row = index / chunks / step.heads;
  const int64_t begin = chunk * step.query_chunk, end = std::min(step.queries, begin + step.query_chunk);
  const int64_t keys = step.keys, padded_keys = (keys + kLanes - 1) / kLanes * kLanes, width = step.width;
  // the keys transposed, [width, keys], so that scores come a vector of keys at a time
  float* const transposed = Scratch::floats(scratch.patch, width * padded_keys);
  float* const scores = Scratch::floats(scratch.sums, padded_keys + step.value_width + kLanes);
  float* const total = scores + padded_keys;
  for (int64_t t = 0; t < keys; ++t) {
    const float* const k = token(slots, step.k, row, head, t);
    for (int64_t d = 0; d < width; ++d) transposed[d * padded_keys + t] = k[d];
  }
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t t = keys; t < padded_keys; ++t) transposed[d * padded_keys + t] = 0;
  }
  const float scale = static_cast<float>(step.scale);
  for (int64_t i = begin; i < end; ++i) {
    const float* const q = token(slots, step.q, row, head, i);
    Vector most = splat(-INFINITY);
    for (int64_t t = 0; t < padded_keys; t += kLanes) {
      Vector s{};
      for (int64_t d = 0; d < width; ++d) s += q[d] * load(transposed + d * padded_keys + t);
      s *= scale;
      store(scores + t, s);
    }
    for (int64_t t = keys; t < padded_keys; ++t) scores[t] = -INFINITY;
    for (int64_t t = 0; t < padded_keys; t += kLanes) {
      const Vector s = load(scores + t);
      most = s > most ? s : most;
    }
    float largest = -INFINITY;
    for (int l = 0; l < kLanes; ++l) largest = std::max(largest, most[l]);
    Vector sums{};
    for (int64_t t = 0; t < padded_keys; t += kLanes) {
      const Vector e = exponential(load(scores + t) - largest);
      store(scores + t, e);
      sums += e;
    }
    const float inverse = 1.0f / sum(sums);
    std::fill_n(total, step.value_width + kLanes, 0.0f);
    for (int64_t t = 0; t < keys; ++t) {
      const float* const v = token(slots, step.v, row, head, t);
      const float weight = scores[t];
      for (int64_t d = 0; d < step.value_width; ++d) total[d] += weight * v[d];
    }
    float* const out = const_cast<float*>(token(slots, step.out, row, head, i));
    for (int64_t d = 0; d < step.value_width; ++d) out[d] = total[d] * inverse;
  }
}
