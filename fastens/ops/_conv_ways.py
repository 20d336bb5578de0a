"""Library calls that make up a member-batched convolution: K of them, a grouped one, or for 1x1 a batched product."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastens.device import convolution_precision
from fastens.ops._dispatch import missing
from fastens.ops.conv2d import output_size
from fastens.reference.linear import linear

# On a CPU, the native kernel is taken for at most so many products, channels last or not; the library's fixed costs of
# a call outweigh that it packs its kernels each time. Measured at 5 members on two cores with AVX-512, 8x8 to 32x32
# pixels: 2 to 4 times as fast at 10 million products, 1.4 at 50 million; at 200 million 1.0 to 1.2 times channels last,
# and 0.7 to 1.2 times where images are brought into that layout and back.
MOST_PRODUCTS = {True: 200_000_000, False: 50_000_000}


Result = TypeVar("Result")


class Convolution(NamedTuple):
    """The arguments of :func:`fastens.ops.conv.conv`, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int
    offsets: Tensor | None = None


def of_convolution(function: Callable[[Convolution], Result]) -> Callable[..., Result]:
    """A function of the arguments themselves, as ways are called, from one of their record."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Result:
        return function(Convolution(*arguments))

    return called


def channels_last(x: Tensor) -> bool:
    """Whether channels, and not space, are next to each other in memory."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


@of_convolution
def key(c: Convolution) -> str:
    """What the speed of a convolution depends on but the device: shapes, layout, dtype and settings, as text."""
    parts = [
        f"{str(c.x.dtype).removeprefix('torch.')} x{list(c.x.shape)} w{list(c.weight.shape)} s{list(c.stride)} "
        f"p{list(c.padding)} d{list(c.dilation)} g{c.groups}",
        f"transposed{list(c.output_padding)}" if c.transposed else "",
        _layout(c.x),
        f"kernels {_layout(c.weight[0])}" if _layout(c.weight[0]) else "",
        "" if c.bias is not None else "no bias",
        "" if c.offsets is None else "ragged",
        convolution_precision() if c.x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def _layout(x: Tensor) -> str:
    return "" if x.is_contiguous() else "channels_last" if channels_last(x) else "strided"


@of_convolution
def grouped(c: Convolution) -> Tensor:
    """One convolution with the members as groups of channels (HFTA, arXiv 2102.02344); layouts are kept."""
    members = c.weight.shape[0]
    by_member = c.x.unflatten(0, (members, -1))  # [K, B, C, *space]
    last = channels_last(c.x) or channels_last(c.weight[0])  # what the library gives then
    if last:
        joined = by_member.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    else:
        joined = by_member.transpose(0, 1).flatten(1, 2)
    y = torch.convolution(
        joined,
        c.weight.flatten(0, 1),
        None if c.bias is None else c.bias.flatten(),
        c.stride,
        c.padding,
        c.dilation,
        c.transposed,
        c.output_padding,
        members * c.groups,
    )
    if last:
        return y.movedim(1, -1).unflatten(-1, (members, -1)).movedim(-2, 0).flatten(0, 1).contiguous().movedim(-1, 1)
    return y.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 1)


@of_convolution
def refuses_grouped(c: Convolution) -> str | None:
    """Why one grouped convolution cannot be taken, or none."""
    if c.offsets is not None:
        return "groups of unequal size"
    if c.weight.shape[0] == 1:
        return "one member: it is the same call"
    return "no rows" if c.x.shape[0] == 0 else None


@of_convolution
def matmul(c: Convolution) -> Tensor:
    """A 1x1 convolution as one product per member, batched."""
    if channels_last(c.x):
        return linear(c.x.movedim(1, -1), c.weight.flatten(2), c.bias).movedim(-1, 1)
    kernels, pixels = c.weight.flatten(2), c.x.flatten(2)  # [K, C_out, C_in], [K, C_in, pixels]
    y = torch.bmm(kernels, pixels) if c.bias is None else torch.baddbmm(c.bias.unsqueeze(-1), kernels, pixels)
    return y.unflatten(-1, c.x.shape[2:])


@of_convolution
def refuses_matmul(c: Convolution) -> str | None:
    """Why a convolution is no product of matrices, or none."""
    if c.offsets is not None:
        return "groups of unequal size"
    if c.transposed or c.groups != 1 or c.weight.shape[3:].numel() != 1:
        return "not a plain 1x1 convolution"
    if any(s != 1 for s in c.stride) or any(p != 0 for p in c.padding):
        return "stride or padding"
    if not channels_last(c.x) and c.x.shape[0] != c.weight.shape[0]:
        return "space innermost and several rows a member: the kernels would be copied for each"
    return None


@of_convolution
def refuses_native(c: Convolution) -> str | None:
    """Why the native kernel cannot be taken, or none."""
    if c.transposed or c.groups != 1 or any(d != 1 for d in c.dilation):
        return "transposed, grouped or dilated"
    if c.x.ndim not in (3, 4):
        return "not in one or two dimensions"
    if c.x.dtype != torch.float32 or c.weight.dtype != torch.float32:
        return "not float32"
    if c.weight.shape[2] == 0:
        return "no channels"
    if c.x.device.type != "cpu":
        return f"the tensors are on {c.x.device}, and the kernel serves the CPU"
    if torch.compiler.is_compiling():  # which does not trace how libraries are found; asked for where missing, it fails
        return None
    return missing("_conv_native", "native", c.x.device, c.x.dtype)


@of_convolution
def rule(c: Convolution) -> str | None:
    """Return the heuristic's choice for a convolution on a CPU, None for the default."""
    if refuses_native(*c) is not None:
        return None
    products = c.x.shape[0] * c.weight[0].numel() * math.prod(output_size(c.x, c.weight, c.stride, c.padding))
    return "native" if products <= MOST_PRODUCTS[channels_last(c.x)] else None
