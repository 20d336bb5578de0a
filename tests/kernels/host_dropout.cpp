// The CUDA dropout kernel's code per work item, csrc/cuda/drop.h, compiled for the host: what the tests call.
#include "cuda/drop.h"

using namespace fastens;

namespace {

template <class T>
void drop_all(const DropJob& job, bool packed) {
  for (int64_t i = 0; i < job.items(); ++i) packed ? drop_at<T, true>(job, i) : drop_at<T, false>(job, i);
}

}  // namespace

// x and out [rows, channels * space] in float or double; `samples` may be null.
extern "C" void drop_on_host(bool wide, bool packed, bool channels_last, const void* x, void* out,
                             const int64_t* members, const int64_t* samples, int64_t rows, int64_t channels,
                             int64_t space, double p, uint64_t key, uint32_t evaluation, const char* activation) {
  DropJob job;
  job.x = x;
  job.out = out;
  job.members = members;
  job.samples = samples;
  job.rows = rows;
  job.channels = channels;
  job.space = space;
  job.channels_last = channels_last;
  job.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  job.key = key;
  job.scale = p < 1 ? 1 / (1 - p) : 0.0;
  job.evaluation = evaluation;
  job.activation = activation_of(activation);
  wide ? drop_all<double>(job, packed) : drop_all<float>(job, packed);
}
