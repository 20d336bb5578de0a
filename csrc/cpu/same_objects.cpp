// Whether lists and dictionaries of Python hold the objects that they held: what fastens/network/looks.py calls by
// ctypes, with the interpreter lock. A look of Python's own takes 25 ns a value, this 10.
#include <cstdint>

#include "export.h"

extern "C" {

// Of Python's stable ABI, and weak, as in forest/python_buffer.h.
__attribute__((weak)) void* PyDict_GetItemWithError(void* dict, void* key);
__attribute__((weak)) int PyDict_Next(void* dict, intptr_t* at, void** key, void** value);
__attribute__((weak)) intptr_t PyDict_Size(void* dict);
__attribute__((weak)) intptr_t PyList_Size(void* list);
__attribute__((weak)) void* PyList_GetItem(void* list, intptr_t at);

enum FastensHolds : int64_t { kUnderName, kItems, kPairs };

// What an owner holds: a value under a key; or as many items or pairs as `key` says, which the next entries have.
struct FastensHeld {
  void *owner, *key, *value;
  int64_t holds;
};

FASTENS_EXPORT int fastens_same_objects(const FastensHeld* held, int64_t count) {
  for (const FastensHeld *h = held, *end = held + count; h != end; ++h) {
    const auto size = reinterpret_cast<intptr_t>(h->key);
    if (h->holds == kUnderName) {
      if (PyDict_GetItemWithError(h->owner, h->key) != h->value) return 0;
    } else if (h->holds == kItems) {
      if (PyList_Size(h->owner) != size) return 0;
      for (intptr_t i = 0; i < size; ++i) {
        if (PyList_GetItem(h->owner, i) != h[i + 1].value) return 0;
      }
      h += size;
    } else {
      if (PyDict_Size(h->owner) != size) return 0;
      void *key = nullptr, *value = nullptr;
      intptr_t at = 0;
      for (intptr_t i = 1; i <= size && PyDict_Next(h->owner, &at, &key, &value); ++i) {
        if (key != h[i].key || value != h[i].value) return 0;
      }
      h += size;
    }
  }
  return 1;
}
}
