// The kernels for any machine.
#define FASTENS_SET baseline
#define FASTENS_SET_COMPILED
#include "kernel_set.h"
