"""Results of operations that a recording does not compute, because only their shapes matter to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastens.ops.conv2d import output_size
from fastens.trace.record import mapped

_LIKE_INPUT = {"fastens::dropout", *(f"fastens::{name}_norm" for name in ("group", "layer", "rms", "batch"))}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"}


def sketched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation would return, in shape, strides and dtype, filled with zeros.

    Args:
        func: the operation.
        args: its arguments, which depend on the input of the pass.
        kwargs: its keyword arguments.

    Returns:
        The result, or none for an operation that is as quickly computed, or whose shape only computing tells.
    """
    name = func._schema.name
    if name in _LIKE_INPUT:
        return torch.zeros_like(args[0])
    if name == "fastens::linear":
        x, weight = args[:2]
        return x.new_zeros((*x.shape[:-1], weight.shape[1]))
    if name == "fastens::conv" and not args[6]:
        x, weight, _, stride, padding, dilation = args[:6]
        return x.new_zeros((x.shape[0], weight.shape[1], *output_size(x, weight, stride, padding, dilation)))
    if name == "aten::native_group_norm":
        return (torch.zeros_like(args[0]), *(args[0].new_zeros(args[3], args[6]) for _ in range(2)))
    if name in _PRODUCTS or name.startswith("aten::_scaled_dot_product"):
        meta = mapped(Tensor, _on_meta, (args, kwargs))
        device = next(x.device for x in args if isinstance(x, Tensor))
        return mapped(Tensor, lambda x: _zeros(x, device), func(*meta[0], **meta[1]))
    return None


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _zeros(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()
