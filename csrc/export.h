// A C function that Python calls by ctypes: all else is hidden.
#pragma once

#define FASTENS_EXPORT __attribute__((visibility("default")))
