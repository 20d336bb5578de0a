"""Our own kernel among the ways of a convolution: what it takes, and in which tilings it is tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastens.ops._conv_ways import channels_last
from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.ops.conv2d import conv2d, output_size

WIDE_OUTPUTS = 128  # up to as many output channels, a wide tile is an ordinary one


def run(tiling: str) -> Callable[..., Tensor]:
    """The way that convolves in one launch for all members, in this tiling."""

    def way(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        offsets: Tensor | None = None,
    ) -> Tensor:
        y, _ = conv2d(x, weight, bias, stride, padding, offsets, tiling=tiling, backend="triton")
        return y if channels_last(x) or channels_last(weight[0]) else y.contiguous()  # as the library gives it

    return way


def refuses(tiling: str) -> Callable[..., str | None]:
    """Why the kernel does not take a convolution in this tiling, or none."""

    def why(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        offsets: Tensor | None = None,
    ) -> str | None:
        if x.ndim != 4:
            return "not two-dimensional"
        if transposed or groups != 1 or any(d != 1 for d in dilation):
            return "transposed, in groups of channels or dilated"
        if x.dtype not in KERNEL_DTYPES or any(t.dtype != x.dtype for t in (weight, bias) if t is not None):
            return "a dtype that the kernel has not, or several"
        if x.shape[0] == 0 or min(output_size(x, weight, stride, padding)) < 1:
            return "nothing to compute"
        if tiling == "wide":
            if weight.shape[1] <= WIDE_OUTPUTS or x.dtype == torch.float64:
                return "no more outputs than an ordinary tile has"
            if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
                return "a tile of more sums than there are registers before compute capability 9.0"
        return missing_triton(x.device)

    return why
