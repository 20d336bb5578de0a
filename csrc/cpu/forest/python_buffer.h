// NumPy arrays through Python's buffer protocol without Python's headers: one library serves every Python. The
// protocol's structure and functions are in the stable ABI since 3.11; the process that runs Python has the functions.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

extern "C" {
struct FastensPyBuffer {
  void* buf;
  void* obj;
  intptr_t len, itemsize;
  int readonly, ndim;
  char* format;
  intptr_t *shape, *strides, *suboffsets;
  void* internal;
};
// Weak, so that a process without Python can load the library all the same.
__attribute__((weak)) int PyObject_GetBuffer(void* object, FastensPyBuffer* view, int flags);
__attribute__((weak)) void PyBuffer_Release(FastensPyBuffer* view);
__attribute__((weak)) void* PyEval_SaveThread();
__attribute__((weak)) void PyEval_RestoreThread(void* state);
}

namespace fastens::forest {

// Python has set an exception of its own: ctypes raises it.
struct PythonError {};

// The memory of an array, held for as long as this lives, by a thread that has the interpreter lock.
class Array {
 public:
  static constexpr int kRead = 0x1C, kWrite = 0x3D;  // strides and format; writable and C-contiguous besides

  Array(void* object, int flags) {
    if (PyObject_GetBuffer(object, &view_, flags)) throw PythonError();
  }
  ~Array() { PyBuffer_Release(&view_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  int dimensions() const { return view_.ndim; }
  int64_t size(int dimension) const { return view_.shape[dimension]; }
  int64_t stride(int dimension) const { return view_.strides[dimension]; }
  void* data() const { return view_.buf; }
  bool holds(char format) const { return view_.format && view_.format[0] == format && view_.format[1] == 0; }

  // The values of a contiguous array of `count` values of one type.
  template <class T>
  T* values(int64_t count, const char* name) const {
    if (view_.itemsize != sizeof(T) || view_.len != count * static_cast<int64_t>(sizeof(T))) {
      throw std::invalid_argument("forest: `" + std::string(name) + "` has " + std::to_string(view_.len) +
                                  " bytes, expected " + std::to_string(count * static_cast<int64_t>(sizeof(T))));
    }
    return static_cast<T*>(view_.buf);
  }

 private:
  FastensPyBuffer view_;
};

// Lets other threads of Python run.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  ~WithoutLock() { PyEval_RestoreThread(state_); }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  void* state_;
};

}  // namespace fastens::forest
