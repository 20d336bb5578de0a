"""Library calls that make up a member-batched convolution: K of them, a grouped one, or for 1x1 a batched product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastens.ops._dispatch import missing
from fastens.ops.conv2d import output_size
from fastens.reference.linear import linear

# On a CPU, the native kernel is taken for at most so many products, channels last or not; the library's fixed costs of
# a call outweigh that it packs its kernels each time. Measured at 5 members on two cores with AVX-512, 8x8 to 32x32
# pixels: 2 to 4 times as fast at 10 million products, 1.4 at 50 million; at 200 million 1.0 to 1.2 times channels last,
# and 0.7 to 1.2 times where images are brought into that layout and back.
MOST_PRODUCTS = {True: 200_000_000, False: 50_000_000}


def channels_last(x: Tensor) -> bool:
    """Whether channels, and not space, are next to each other in memory."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def key(
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
) -> str:
    """What the speed of a convolution depends on but the device: shapes, layout, dtype and settings, as text."""
    parts = [
        f"{str(x.dtype).removeprefix('torch.')} x{list(x.shape)} w{list(weight.shape)} s{list(stride)} "
        f"p{list(padding)} d{list(dilation)} g{groups}",
        f"transposed{list(output_padding)}" if transposed else "",
        _layout(x),
        f"kernels {_layout(weight[0])}" if _layout(weight[0]) else "",
        "" if bias is not None else "no bias",
        "" if offsets is None else "ragged",
        torch.backends.cudnn.conv.fp32_precision if x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def _layout(x: Tensor) -> str:
    return "" if x.is_contiguous() else "channels_last" if channels_last(x) else "strided"


def grouped(
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
    """One convolution with the members as groups of channels (HFTA, arXiv 2102.02344); layouts are kept."""
    members = weight.shape[0]
    by_member = x.unflatten(0, (members, -1))  # [K, B, C, *space]
    last = channels_last(x) or channels_last(weight[0])  # what the library gives then
    if last:
        joined = by_member.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    else:
        joined = by_member.transpose(0, 1).flatten(1, 2)
    y = torch.convolution(
        joined,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        members * groups,
    )
    if last:
        return y.movedim(1, -1).unflatten(-1, (members, -1)).movedim(-2, 0).flatten(0, 1).contiguous().movedim(-1, 1)
    return y.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 1)


def refuses_grouped(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why one grouped convolution cannot be taken, or none."""
    if rest[-1] is not None:
        return "groups of unequal size"
    if weight.shape[0] == 1:
        return "one member: it is the same call"
    return "no rows" if x.shape[0] == 0 else None


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """A 1x1 convolution as one product per member, batched."""
    if channels_last(x):
        return linear(x.movedim(1, -1), weight.flatten(2), bias).movedim(-1, 1)
    kernels, pixels = weight.flatten(2), x.flatten(2)  # [K, C_out, C_in], [K, C_in, pixels]
    y = torch.bmm(kernels, pixels) if bias is None else torch.baddbmm(bias.unsqueeze(-1), kernels, pixels)
    return y.unflatten(-1, x.shape[2:])


def refuses_matmul(
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
    """Why a convolution is no product of matrices, or none."""
    if offsets is not None:
        return "groups of unequal size"
    if transposed or groups != 1 or weight.shape[3:].numel() != 1:
        return "not a plain 1x1 convolution"
    if any(s != 1 for s in stride) or any(p != 0 for p in padding):
        return "stride or padding"
    if not channels_last(x) and x.shape[0] != weight.shape[0]:
        return "space innermost and several rows a member: the kernels would be copied for each"
    return None


def refuses_native(
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
    """Why the native kernel cannot be taken, or none."""
    if transposed or groups != 1 or any(d != 1 for d in dilation):
        return "transposed, grouped or dilated"
    if x.ndim not in (3, 4):
        return "not in one or two dimensions"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return "not float32"
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, and the kernel serves the CPU"
    if torch.compiler.is_compiling():  # which does not trace how libraries are found; asked for where missing, it fails
        return None
    return missing("_conv_native", "native", x.device, x.dtype)


def rule(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *rest: Any
) -> str | None:
    """The way of a convolution on a CPU, none for the default."""
    if refuses_native(x, weight, bias, stride, padding, *rest) is not None:
        return None
    products = x.shape[0] * weight[0].numel() * math.prod(output_size(x, weight, stride, padding))
    return "native" if products <= MOST_PRODUCTS[channels_last(x)] else None
