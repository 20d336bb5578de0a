// The kernels of every kind of step for one instruction set.
#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "isa/vectors.h"
#include "kernels/half.h"
#include "kernels/philox.h"

namespace fastens::program::FASTENS_LEVEL {

// The pieces have no includes of their own.
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

static void conv(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_conv<convolve>(as<Conv>(step), slots, task, scratch);
}
static void norm(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_norm(as<Norm>(step), slots, task, scratch);
}
static void pointwise(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_pointwise(as<Pointwise>(step), slots, task);
}
static void layer_norm(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_layer_norm(as<LayerNorm>(step), slots, task);
}
static void attention(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_attention(as<Attention>(step), slots, task, scratch);
}

static void winograd(const int64_t* step, const Slots& slots, int64_t task, Scratch& scratch) {
  run_conv<convolve_winograd>(as<program::Winograd>(step), slots, task, scratch);
}

static void draw(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_draw(as<Draw>(step), slots, task);
}
static void drop(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_drop(as<Drop>(step), slots, task);
}
static void gather(const int64_t* step, const Slots& slots, int64_t task, Scratch&) {
  run_gather(as<Gather>(step), slots, task);
}

extern const Kernels kKernels{
    {nullptr, conv, norm, pointwise, layer_norm, attention, winograd, draw, drop, gather},
#ifdef __AVX512BF16__
    true,
#else
    false,
#endif
};

}  // namespace fastens::program::FASTENS_LEVEL
