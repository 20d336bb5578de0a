"""The activations that an op can end in."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


def activate(x: Tensor, activation: str) -> Tensor:
    """``none`` (x itself), ``silu``, ``gelu`` or ``gelu_tanh`` of x."""
    return x if activation == "none" else FUNCTIONS[activation](x)
