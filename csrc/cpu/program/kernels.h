// The kernels of every kind of step, once for each instruction set: the pieces below have neither guards nor includes
// of their own, so that every function in them is compiled for the target of the place that includes this file.

#include "vector_math.h"
// what follows uses the vectors above
#include "image.h"
// what follows uses the images above
#include "attention.h"
#include "conv.h"
#include "drop.h"
#include "norm.h"
#include "pointwise.h"
// what follows uses the convolution above
#include "winograd.h"

using Run = void (*)(const int64_t*, const Slots&, int64_t, Scratch&);

inline void conv(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_conv<convolve>(as<Conv>(step), slots, task, scratch);
}
inline void norm(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_norm(as<Norm>(step), slots, task, scratch);
}
inline void pointwise(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_pointwise(as<Pointwise>(step), slots, task);
}
inline void layer_norm(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_layer_norm(as<LayerNorm>(step), slots, task);
}
inline void attention(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_attention(as<Attention>(step), slots, task, scratch);
}

inline void winograd(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_conv<convolve_winograd>(as<Conv>(step), slots, task, scratch);
}

inline void draw(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_draw(as<Draw>(step), slots, task);
}
inline void drop(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_drop(as<Drop>(step), slots, task);
}
inline void gather(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_gather(as<Gather>(step), slots, task);
}

constexpr Run kRuns[] = {nullptr, conv, norm, pointwise, layer_norm, attention, winograd, draw, drop, gather};
