"""Implementations of a convolution summed over members: its prologue fused, or in a pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastens.device import convolution_precision
from fastens.ops._choice import Choice, Way
from fastens.ops._tma_ways import prepared, refuses_pass
from fastens.program.block import ConvBlock


def key(block: ConvBlock, _: list[float]) -> str:
    """What the speed depends on but the device."""
    before = block.prologue
    parts = [
        f"{str(block.x.dtype).removeprefix('torch.')} x{list(block.x.shape)} w{list(block.weight.shape)} "
        f"s{list(block.stride)} p{list(block.padding)}",
        "" if block.weight[0].is_contiguous() else "kernels channels_last",
        "" if before.moments is None else f"norm{before.moments.shape[1]}",
        "" if before.scale is None else "by row",
        "" if before.activation == "none" else before.activation,
        convolution_precision() if block.x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def fused(block: ConvBlock, member_weights: list[float]) -> Tensor:
    """All of it in one kernel, which normalises and activates an element for each tap of the convolution's kernel."""
    from fastens.kernels.conv2d_sum import conv2d_sum

    return conv2d_sum(block, member_weights)


def apart(block: ConvBlock, member_weights: list[float]) -> Tensor:
    """What is before the convolution in a pass, then the kernel with nothing before it."""
    return fused(prepared(block), member_weights)


def refuses_apart(block: ConvBlock, _: list[float]) -> str | None:
    """Why that cannot be taken, or is the other way, or none."""
    return "nothing before the convolution" if block.begins_plain else refuses_pass(block)


CHOICE = Choice("conv2d_sum", key, {"triton": Way(fused), "triton apart": Way(apart, refuses_apart)})
