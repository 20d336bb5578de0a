"""Our own kernel among the ways of a convolution: what it takes, and in which tilings it is tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastens.device import device_of
from fastens.ops._conv_ways import Convolution, channels_last, of_convolution
from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.ops._tma_ways import refuses_tma
from fastens.ops.conv2d import conv2d, output_size
from fastens.program.block import ConvBlock

WIDE_OUTPUTS = 128  # up to as many output channels, a wide tile is an ordinary one


def run(tiling: str) -> Callable[..., Tensor]:
    """The way that convolves in one launch for all members, in this tiling."""

    @of_convolution
    def way(c: Convolution) -> Tensor:
        y, _ = conv2d(ConvBlock(c.x, c.weight, c.bias, c.stride, c.padding, c.offsets), tiling, "triton")
        return y if channels_last(c.x) or channels_last(c.weight[0]) else y.contiguous()  # as the library gives it

    return way


def refuses(tiling: str) -> Callable[..., str | None]:
    """Why the kernel does not take a convolution in this tiling, or none."""

    @of_convolution
    def why(c: Convolution) -> str | None:
        if c.x.ndim != 4:
            return "not two-dimensional"
        if c.transposed or c.groups != 1 or any(d != 1 for d in c.dilation):
            return "transposed, in groups of channels or dilated"
        if c.x.dtype not in KERNEL_DTYPES or any(t.dtype != c.x.dtype for t in (c.weight, c.bias) if t is not None):
            return "a dtype that the kernel has not, or several"
        if c.x.shape[0] == 0 or min(output_size(c.x, c.weight, c.stride, c.padding)) < 1:
            return "nothing to compute"
        if tiling == "wide":
            if c.weight.shape[1] <= WIDE_OUTPUTS or c.x.dtype == torch.float64:
                return "no more outputs than an ordinary tile has"
            if (device_of(c.x).generation or 9) < 9:
                return "a tile of more sums than there are registers before compute capability 9.0"
        return missing_triton(c.x.device)

    return why


def run_tma(tiling: str) -> Callable[..., Tensor]:
    """The way that convolves by the kernel of tensor descriptors."""

    @of_convolution
    def way(c: Convolution) -> Tensor:
        from fastens.kernels._conv2d_tma import conv2d_tma

        return conv2d_tma(ConvBlock(c.x, c.weight, c.bias, c.stride, c.padding), tiling)[0]

    return way


def refuses_conv_tma(tiling: str) -> Callable[..., str | None]:
    """Why that kernel does not take a convolution in this tiling, or none."""
    pointers = refuses("auto")

    @of_convolution
    def why(c: Convolution) -> str | None:
        if c.offsets is not None:
            return "groups of unequal size"
        return pointers(*c) or refuses_tma(
            tiling, c.x, c.weight, c.stride, output_size(c.x, c.weight, c.stride, c.padding)
        )

    return why
