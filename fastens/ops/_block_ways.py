"""Ways of a convolution with what is before and behind it, as GPU plans run it: kernels of ours, or the library.

Every way takes the same arguments, of which the first two say where result and moments are written (none for new
memory), and returns the result. ``size`` is that of the result's space: how many zeros are below and to the right
follows from it. The rest is as for :func:`fastens.ops.conv2d.conv2d`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.ops._choice import Choice, Way
from fastens.ops._conv_kernels import WIDE_OUTPUTS
from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.ops._tma_ways import (
    TILINGS,
    Block,
    fills_less_than,
    pointers_apart,
    refuses_block,
    refuses_pass,
    refuses_pointers_apart,
    tma,
)
from fastens.ops.conv import conv
from fastens.ops.conv2d import output_size
from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.reference._activation import activate
from fastens.reference.conv2d import keeps, prepared, together


def key(into: Tensor | None, found: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> str:
    """What the speed depends on but the device: shapes, dtype, and what is before and behind the convolution."""
    bias, stride, padding, size, moments, _, _, _, scale, _, activation, row_bias, residual, _, last, groups = rest[:16]
    skip, _, norm_groups = rest[16:] or (None, None, 0)
    parts = [
        f"{str(x.dtype).removeprefix('torch.')} x{list(x.shape)} w{list(weight.shape)} s{list(stride)} "
        f"p{list(padding)} y{list(size)}",
        "" if bias is not None else "no bias",
        "" if weight[0].is_contiguous() else "kernels channels_last",
        "" if skip is None else f"skip{skip.shape[1]}",
        "" if moments is None else f"norm{norm_groups or moments.shape[1]}" + ("" if scale is None else " by row"),
        "" if activation == "none" else activation,
        "" if row_bias is None else "row bias",
        "" if residual is None else "residual",
        "" if last == "none" else f"then {last}",
        f"moments{groups}" if groups else "",
        torch.backends.cudnn.conv.fp32_precision if x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def library(
    into: Tensor | None, found: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
    padding: tuple[int, int], size: tuple[int, int], moments: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, activation: str,
    row_bias: Tensor | None, residual: Tensor | None, output_scale: float, output_activation: str, num_groups: int,
    skip: Tensor | None = None, skip_moments: Tensor | None = None, norm_groups: int = 0, *,
    offsets: Tensor | None = None, mask: Tensor | None = None, mask_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Norm and activation as one kernel, the convolution in the way that measures best, and what is behind it."""
    block = Block(
        into, found, x, weight, bias, stride, padding, size, moments, norm_weight, norm_bias, eps, scale, shift,
        activation, row_bias, residual, output_scale, output_activation, num_groups, skip, skip_moments, norm_groups,
    )  # fmt: skip
    if offsets is None and not block.begins_plain and refuses_pass(*block) is None:
        x = block.prepared()
    else:
        x, moments = together(x, skip, moments, skip_moments, norm_groups)
        if moments is None or not x.is_cuda or activation not in ("none", "silu"):
            x = prepared(x, moments, norm_weight, norm_bias, eps, offsets, scale, shift, activation)
        else:  # an image whose space is innermost, and its statistics again
            x = group_norm(x, moments.shape[1], norm_weight, norm_bias, eps, offsets, scale, shift, activation)
    if mask is not None:
        x = x * (keeps(mask, x, weight.shape[0], offsets) * mask_scale)
    if output_size(x, weight, stride, padding) != tuple(size):  # other zeros below and to the right
        below, right = (
            (n - 1) * s + taps - have - before
            for n, s, taps, have, before in zip(size, stride, weight.shape[3:], x.shape[2:], padding, strict=True)
        )
        x, padding = F.pad(x, (padding[1], right, padding[0], below)), (0, 0)
    y = conv(x, weight, bias, stride, padding, offsets=offsets)
    if row_bias is not None:
        y = y + row_bias[:, :, None, None]
    if residual is not None:
        y = y + residual
    y = activate(y if output_scale == 1 else y * output_scale, output_activation)
    y = y if into is None else into.copy_(y)
    if num_groups:
        taken = group_moments(y, num_groups)
        if found is not None:
            found.copy_(taken)
    return y


def fused(tiling: str) -> Callable[..., Tensor]:
    """All of it in one kernel of ours."""

    def way(into: Tensor | None, found: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        from fastens.kernels.conv2d import conv2d

        bias, stride, padding, size, *others = rest[:16]
        skip, skip_moments, norm_groups = rest[16:] or (None, None, 0)
        if into is None:
            shape = (x.shape[0], weight.shape[1], *size)
            into = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y, _ = conv2d(
            x, weight, bias, stride, padding, None, *others, False, tiling, skip, skip_moments, norm_groups,
            into=(into, found),
        )  # fmt: skip
        return y

    return way


def refuses(tiling: str) -> Callable[..., str | None]:
    """Why the kernel does not take it in this tiling, or none."""

    def why(into: Tensor | None, found: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> str | None:
        images = [image for image in (x, into, *rest[16:17]) if image is not None]
        if not all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
            return "an image whose channels are not last in memory"
        if x.dtype not in KERNEL_DTYPES or any(t.dtype != x.dtype for t in (*images, weight)):
            return "a dtype that the kernel has not, or several"
        if x.numel() == 0:
            return "nothing to compute"
        if tiling == "wide":
            if weight.shape[1] <= WIDE_OUTPUTS or x.dtype == torch.float64:
                return "no more outputs than an ordinary tile has"
            if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
                return "a tile of more sums than there are registers before compute capability 9.0"
        return missing_triton(x.device)

    return why


def rule(*arguments: Any) -> str | None:
    """The way of a shape that is first met while a graph is recorded, none for the library's.

    Where the library's several kernels for each member would leave most of the GPU idle, it is one kernel for all;
    Triton's pointer loads reach 140 to 180 % of cuDNN there, and 36 to 71 % on large shapes.
    """
    c = Block(*arguments)
    if not c.x.is_cuda or refuses("auto")(*arguments) is not None:
        return None
    multiprocessors = torch.cuda.get_device_properties(c.x.device).multi_processor_count
    return "triton" if fills_less_than(c, multiprocessors) else None


CHOICE = Choice(
    "conv2d",
    key,
    {
        "library": Way(library),
        "triton": Way(fused("auto"), refuses("auto")),
        "triton narrow": Way(fused("narrow"), refuses("narrow")),
        "triton wide": Way(fused("wide"), refuses("wide")),
        "triton apart": Way(pointers_apart, refuses_pointers_apart),
        **{tiling: Way(tma(tiling), refuses_block(tiling)) for tiling in TILINGS},
    },
    rule=rule,
)
