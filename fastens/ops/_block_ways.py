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


def key(*arguments: Any) -> str:
    """What the speed depends on but the device: shapes, dtype, and what is before and behind the convolution."""
    c = Block(*arguments)
    norm = "" if c.moments is None else f"norm{c.norm_groups or c.moments.shape[1]}"
    parts = [
        f"{str(c.x.dtype).removeprefix('torch.')} x{list(c.x.shape)} w{list(c.weight.shape)} s{list(c.stride)} "
        f"p{list(c.padding)} y{list(c.size)}",
        "" if c.bias is not None else "no bias",
        "" if c.weight[0].is_contiguous() else "kernels channels_last",
        "" if c.skip is None else f"skip{c.skip.shape[1]}",
        norm if not norm or c.scale is None else f"{norm} by row",
        "" if c.activation == "none" else c.activation,
        "" if c.row_bias is None else "row bias",
        "" if c.residual is None else "residual",
        "" if c.output_activation == "none" else f"then {c.output_activation}",
        f"moments{c.num_groups}" if c.num_groups else "",
        torch.backends.cudnn.conv.fp32_precision if c.x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def library(
    *arguments: Any, offsets: Tensor | None = None, mask: Tensor | None = None, mask_scale: float = 1.0
) -> Tensor:
    """Norm and activation as one kernel, the convolution in the way that measures best, and what is behind it.

    On a CPU, where Triton's kernels can only be interpreted, all of it is torch's.
    """
    c = Block(*arguments)
    if c.x.is_cuda and offsets is None and not c.begins_plain and refuses_pass(*c) is None:
        x = c.prepared()
    else:
        x, moments = together(c.x, c.skip, c.moments, c.skip_moments, c.norm_groups)
        mapping = (c.norm_weight, c.norm_bias, c.eps, offsets, c.scale, c.shift, c.activation)
        if moments is None or not x.is_cuda or c.activation not in ("none", "silu"):
            x = prepared(x, moments, *mapping)
        else:  # an image whose space is innermost, and its statistics again
            x = group_norm(x, moments.shape[1], *mapping)
    if mask is not None:
        x = x * (keeps(mask, x, c.weight.shape[0], offsets) * mask_scale)
    padding = c.padding
    if output_size(x, c.weight, c.stride, padding) != tuple(c.size):  # other zeros below and to the right
        below, right = (
            (n - 1) * s + taps - have - before
            for n, s, taps, have, before in zip(c.size, c.stride, c.weight.shape[3:], x.shape[2:], padding, strict=True)
        )
        x, padding = F.pad(x, (padding[1], right, padding[0], below)), (0, 0)
    y = conv(x, c.weight, c.bias, c.stride, padding, offsets=offsets)
    if c.row_bias is not None:
        y = y + c.row_bias[:, :, None, None]
    if c.residual is not None:
        y = y + c.residual
    y = activate(y if c.output_scale == 1 else y * c.output_scale, c.output_activation)
    y = y if c.into is None else c.into.copy_(y)
    if c.num_groups:
        taken = group_moments(y, c.num_groups)
        if c.found is not None:
            c.found.copy_(taken)
    return y


def fused(tiling: str) -> Callable[..., Tensor]:
    """All of it in one kernel of ours."""

    def way(
        *arguments: Any, offsets: Tensor | None = None, mask: Tensor | None = None, mask_scale: float = 1.0
    ) -> Tensor:
        from fastens.kernels.conv2d import conv2d

        c = Block(*arguments)
        y, _ = conv2d(
            c.x, c.weight, c.bias, c.stride, c.padding, offsets, c.moments, c.norm_weight, c.norm_bias, c.eps, c.scale,
            c.shift, c.activation, c.row_bias, c.residual, c.output_scale, c.output_activation, c.num_groups, False,
            tiling, c.skip, c.skip_moments, c.norm_groups, mask, mask_scale, into=(c.result(), c.found),
        )  # fmt: skip
        return y

    return way


def refuses(tiling: str) -> Callable[..., str | None]:
    """Why the kernel does not take it in this tiling, or none."""

    def why(*arguments: Any) -> str | None:
        c = Block(*arguments)
        images = [image for image in (c.x, c.into, c.skip) if image is not None]
        if not all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
            return "an image whose channels are not last in memory"
        if c.x.dtype not in KERNEL_DTYPES or any(t.dtype != c.x.dtype for t in (*images, c.weight)):
            return "a dtype that the kernel has not, or several"
        if c.x.numel() == 0:
            return "nothing to compute"
        if tiling == "wide":
            if c.weight.shape[1] <= WIDE_OUTPUTS or c.x.dtype == torch.float64:
                return "no more outputs than an ordinary tile has"
            if c.x.is_cuda and torch.cuda.get_device_capability(c.x.device)[0] < 9:
                return "a tile of more sums than there are registers before compute capability 9.0"
        return missing_triton(c.x.device)

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
