// Whether tensors of Python are as they were when they were last looked at: what fastens/network/weights.py calls by
// ctypes. Python's own `_version` and `data_ptr` of a hundred tensors take 12 us, this 1.
//
// A Python tensor holds an at::Tensor, which is one pointer; where in the object it is, the caller found out. It is
// read where it is, so that an object that was given another tensor is noticed, and no reference is kept.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "export.h"

// at::TensorBase::_version() const, which the stable ABI lacks. Null where libtorch has no such function.
extern "C" __attribute__((weak)) int64_t _ZNK2at10TensorBase8_versionEv(const void* tensor);

namespace {

// A number that dtype, sizes and strides tell apart; none where the tensor does not tell them.
bool layout_of(AtenTensorHandle tensor, uint64_t& layout) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  if (aoti_torch_get_dim(tensor, &dim) || aoti_torch_get_dtype(tensor, &dtype) ||
      aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_strides(tensor, &strides)) {
    return false;
  }
  layout = static_cast<uint64_t>(dtype) << 8 | static_cast<uint64_t>(dim);
  uint64_t of_size = 0x9E3779B97F4A7C15, of_stride = 0xC2B2AE3D27D4EB4F;  // odd, and others for each dimension
  for (int64_t i = 0; i < dim; ++i) {                                     // products that do not wait for each other
    layout += of_size * static_cast<uint64_t>(sizes[i]) ^ of_stride * static_cast<uint64_t>(strides[i]);
    of_size *= 0xD1342543DE82EF95;
    of_stride *= 0xD1342543DE82EF95;
  }
  return true;
}

}  // namespace

extern "C" {

struct FastensWatched {
  const char* object;
  const void* implementation;
  void* address;
  int64_t version;  // -1 for what was made in inference mode and has none
  uint64_t layout;  // of its dtype, sizes and strides, which `tensor.data = ...` changes and no version counts
};

struct FastensWatch {
  FastensWatched* tensors;
  int64_t count, offset;  // of the at::Tensor in its object, in bytes
  int64_t epoch;
};

FASTENS_EXPORT int fastens_watch_layouts_possible() { return _ZNK2at10TensorBase8_versionEv != nullptr; }

// Returns the epoch, one more than before where any of the tensors is not as it was; -1 where one cannot be told. The
// caller holds the interpreter lock: nobody sees the new without the epoch.
FASTENS_EXPORT int64_t fastens_watch(FastensWatch* watch) {
  bool changed = false, told = true;
  for (FastensWatched* w = watch->tensors; w != watch->tensors + watch->count && told; ++w) {
    char* const tensor = const_cast<char*>(w->object) + watch->offset;
    const auto handle = reinterpret_cast<AtenTensorHandle>(tensor);
    FastensWatched now{w->object, *reinterpret_cast<void* const*>(tensor), nullptr, w->version, 0};
    try {
      told = !aoti_torch_get_data_ptr(handle, &now.address) && layout_of(handle, now.layout);
      if (now.version >= 0) now.version = _ZNK2at10TensorBase8_versionEv(tensor);
    } catch (...) {
      told = false;
    }
    changed |= now.implementation != w->implementation || now.address != w->address || now.version != w->version ||
               now.layout != w->layout;
    *w = now;
  }
  watch->epoch += changed || !told;
  return told ? watch->epoch : -1;
}
}
