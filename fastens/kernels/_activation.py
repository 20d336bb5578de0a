"""Activations as Triton functions of a value in float32 or float64."""

import triton
import triton.language as tl


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """``none``, ``silu``, ``gelu`` (the error function's) or ``gelu_tanh`` of y."""
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    return y
