"""The last convolution under a linear rule: summed over the members, so that only the aggregate is written."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops.conv2d import RECORD, check_block, output_size
from fastens.program.block import ConvBlock, flat_schema
from fastens.reference import conv2d_sum as reference


def _fake(block: ConvBlock, member_weights: list[float]) -> Tensor:
    x, weight = block.x, block.weight
    size = (x.shape[0] // weight.shape[0], weight.shape[1], *output_size(x, weight, block.stride, block.padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_conv2d_sum = Op(
    f"conv2d_sum({flat_schema()}, float[] member_weights) -> Tensor",
    reference.conv2d_sum,
    {"triton": _fake},
    record=RECORD,
)


def sums(block: ConvBlock[Any]) -> bool:
    """Whether there is nothing that the kernel has not: offsets, shared rows, a second image, a mask, an epilogue."""
    before = block.prologue
    return before.skip is before.mask is block.offsets is None and block.ends_plain and not block.shared


def conv2d_sum(block: ConvBlock, member_weights: Sequence[float], backend: str = "auto") -> Tensor:
    """Convolve each member's rows and sum over the members: ``sum_k m_k (conv(act(norm(x_k)), W_k) + b_k)``.

    What a network ends in under the rules mean (m_k = 1/K, or its weights) and sum (m_k = 1). Members are part of the
    sum that a convolution is, so their outputs are neither written nor rounded.

    Args:
        block: what is convolved: x [K B, C, H, W] in equal groups, a norm and an activation before it, nothing behind.
        member_weights: K numbers m_k; a member of zero is not used, NaN or not.
        backend: the code that runs it.

    Returns:
        [B, O, H', W'].

    Raises:
        ValueError: rows that cannot be dealt out to the members, shapes that do not fit, more than a norm and an
            activation around the convolution, or an unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_block("conv2d_sum", block)
    if not sums(block) or block.prologue.norm_groups:
        raise ValueError("conv2d_sum: takes equal groups of rows, a norm and an activation; convolve, then aggregate")
    if len(member_weights) != len(block.weight):
        raise ValueError(f"conv2d_sum: {len(member_weights)} member_weights, expected {len(block.weight)}")
    return _conv2d_sum.resolve(backend, block.tensors())(*block.flat(), list(member_weights))
