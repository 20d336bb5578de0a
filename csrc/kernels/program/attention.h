// Attention over the keys of one row and head, for a few queries at a time, with an exact softmax.

FASTENS_INLINE const float* token(const Slots& slots, const Heads& heads, int64_t row, int64_t head, int64_t t) {
  return slots.at(heads.at) + row * heads.row + head * heads.head + t * heads.token;
}

// Scores [Q, padded keys] of Q queries, made into the weights exp(score - max) of the softmax; 1 / their sums.
template <int Q>
FASTENS_INLINE void attention_weights(const float* const* q, const float* keys, int64_t num_keys, int64_t padded_keys,
                                      int64_t width, float scale, float* scores, float* inverse) {
  for (int64_t t = 0; t < padded_keys; t += kRegisterLanes) {
    Vector acc[Q] = {};
    for (int64_t d = 0; d < width; ++d) {
      const Vector k = load(keys + d * padded_keys + t);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) acc[i] += splat(q[i][d]) * k;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) store(scores + i * padded_keys + t, acc[i] * scale);
  }
  for (int i = 0; i < Q; ++i) {
    float* const own = scores + i * padded_keys;
    for (int64_t t = num_keys; t < padded_keys; ++t) own[t] = -INFINITY;
    Vector most = load(own);
    for (int64_t t = kRegisterLanes; t < padded_keys; t += kRegisterLanes) {
      const Vector s = load(own + t);
      most = s > most ? s : most;
    }
    float largest = most[0];
    for (int l = 1; l < kRegisterLanes; ++l) largest = most[l] > largest ? most[l] : largest;
    Vector sums{};
    for (int64_t t = 0; t < padded_keys; t += kRegisterLanes) {
      const Vector e = exponential(load(own + t) - largest);
      store(own + t, e);
      sums += e;
    }
    inverse[i] = 1.0f / sum(sums);
  }
}

// Brings what one row and head has of keys and values into vectors: the keys transposed, [width, padded keys], so that
// scores come a vector of keys at a time; the values filled up to whole vectors, [keys, padded width].
FASTENS_INLINE void bring(const Attention& step, const Slots& slots, int64_t row, int64_t head, int64_t padded_keys,
                          int64_t padded_width, float* keys, float* values) {
  const float* const k = token(slots, step.k, row, head, 0);
  const float* const v = token(slots, step.v, row, head, 0);
  if (step.k.token == 1) {
    for (int64_t d = 0; d < step.width; ++d) {
      std::memcpy(keys + d * padded_keys, k + d * step.k.channel, step.keys * sizeof(float));
    }
  } else {
    for (int64_t t = 0; t < step.keys; ++t) {
      for (int64_t d = 0; d < step.width; ++d) keys[d * padded_keys + t] = k[t * step.k.token + d * step.k.channel];
    }
  }
  for (int64_t d = 0; d < step.width; ++d) {
    for (int64_t t = step.keys; t < padded_keys; ++t) keys[d * padded_keys + t] = 0;
  }
  for (int64_t t = 0; t < step.keys; ++t) {
    const float* const from = v + t * step.v.token;
    float* const to = values + t * padded_width;
    if (step.v.channel == 1) {
      for (int64_t d = 0; d < padded_width; d += kRegisterLanes)
        store(to + d, load_some(from + d, step.value_width - d));
    } else {
      for (int64_t d = 0; d < step.value_width; ++d) to[d] = from[d * step.v.channel];
      for (int64_t d = step.value_width; d < padded_width; ++d) to[d] = 0;
    }
  }
}

FASTENS_INLINE void run_attention(const Attention& step, const Slots& slots, int64_t index, Scratch& scratch) {
  constexpr int kQueries = 8;
  const int64_t chunks = (step.queries + step.query_chunk - 1) / step.query_chunk;
  const int64_t chunk = index % chunks, head = index / chunks % step.heads, row = index / chunks / step.heads;
  const int64_t begin = chunk * step.query_chunk, end = std::min(step.queries, begin + step.query_chunk);
  const int64_t num_keys = step.keys, padded_keys = (num_keys + kRegisterLanes - 1) / kRegisterLanes * kRegisterLanes,
                width = step.width;
  const int64_t padded_width = (step.value_width + kRegisterLanes - 1) / kRegisterLanes * kRegisterLanes;
  float* const keys = scratch.patch.room((width + kQueries) * padded_keys + num_keys * padded_width + kQueries * width);
  float* const scores = keys + width * padded_keys;
  float* const values = scores + kQueries * padded_keys;
  float* const queries = values + num_keys * padded_width;
  bring(step, slots, row, head, padded_keys, padded_width, keys, values);
  const float scale = static_cast<float>(step.scale);
  for (int64_t i = begin; i < end; i += kQueries) {
    const float* q[kQueries];
    float inverse[kQueries];
    for (int n = 0; n < kQueries; ++n) {
      q[n] = token(slots, step.q, row, head, std::min(i + n, end - 1));
      if (step.q.channel == 1) continue;
      for (int64_t d = 0; d < width; ++d) queries[n * width + d] = q[n][d * step.q.channel];
      q[n] = queries + n * width;
    }
    attention_weights<kQueries>(q, keys, num_keys, padded_keys, width, scale, scores, inverse);
    for (int64_t d = 0; d < step.value_width; d += kRegisterLanes) {
      Vector acc[kQueries] = {};
      for (int64_t t = 0; t < num_keys; ++t) {
        const Vector v = load(values + t * padded_width + d);
#pragma GCC unroll 8
        for (int n = 0; n < kQueries; ++n) acc[n] += splat(scores[n * padded_keys + t]) * v;
      }
      for (int n = 0; n < kQueries && i + n < end; ++n) {
        float* const out = const_cast<float*>(token(slots, step.out, row, head, i + n));
        const Vector result = acc[n] * inverse[n];
        if (step.out.channel == 1) {
          store_some(out + d, result, step.value_width - d);
        } else {
          const int64_t lanes = std::min<int64_t>(kRegisterLanes, step.value_width - d);
          for (int64_t l = 0; l < lanes; ++l) out[(d + l) * step.out.channel] = result[l];
        }
      }
    }
  }
}
