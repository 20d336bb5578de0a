"""Implementations of a convolution block (prologue, convolution, epilogue) on GPUs: our kernels, or the library.

Every way takes the fields of a :class:`fastens.ops._tma_ways.Call` and returns the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.device import convolution_precision, device_of, on_gpu
from fastens.ops._choice import Choice, Way
from fastens.ops._conv_kernels import WIDE_OUTPUTS
from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.ops._tma_ways import (
    HALO,
    TILINGS,
    Call,
    fills_less_than,
    halo,
    pointers_apart,
    prepared,
    refuses_block,
    refuses_halo,
    refuses_pass,
    refuses_pointers_apart,
    tma,
)
from fastens.ops.conv import conv
from fastens.ops.conv2d import output_size
from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.program.block import ConvBlock
from fastens.reference import conv2d as reference
from fastens.reference.conv2d import finished, keeps, together

WIDE_PLACES = 64  # of an image at least, so that a tile of twice as many columns is of two images at most


def key(*arguments: Any) -> str:
    """Return the autotune key: shapes, dtype, and what the prologue and the epilogue do."""
    block, size, *_ = arguments
    before, behind = block.prologue, block.epilogue
    norm = "" if before.moments is None else f"norm{before.norm_groups or before.moments.shape[1]}"
    parts = [
        f"{str(block.x.dtype).removeprefix('torch.')} x{list(block.x.shape)} w{list(block.weight.shape)} "
        f"s{list(block.stride)} p{list(block.padding)} y{list(size)}",
        "" if block.bias is not None else "no bias",
        "" if block.weight[0].is_contiguous() else "kernels channels_last",
        "" if before.skip is None else f"skip{before.skip.shape[1]}",
        norm if not norm or before.scale is None else f"{norm} by row",
        "" if before.activation == "none" else before.activation,
        "" if behind.row_bias is None else "row bias",
        "" if behind.residual is None else "residual",
        "" if behind.output_activation == "none" else f"then {behind.output_activation}",
        f"moments{behind.num_groups}" if behind.num_groups else "",
        convolution_precision() if block.x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def _input(block: ConvBlock) -> Tensor:
    """What the library convolves, but for its mask."""
    before = block.prologue
    if on_gpu(block.x) and block.offsets is None and refuses_pass(block) is None:
        return prepared(block).x
    x, moments = together(block.x, before)
    if moments is None or not on_gpu(x) or before.activation not in ("none", "silu"):
        return reference.prepared(block.x, before, block.offsets)
    # an image whose space is innermost, and its statistics again
    return group_norm(
        x, moments.shape[1], before.norm_weight, before.norm_bias, before.eps, block.offsets, before.scale,
        before.shift, before.activation,
    )  # fmt: skip


def library(*arguments: Any) -> Tensor:
    """Norm and activation as one kernel, the fastest convolution as measured, then the epilogue.

    On a CPU, where Triton's kernels can only be interpreted, all of it is torch's.
    """
    block, size, into, moments = Call(*arguments)
    x, mask, padding = _input(block), block.prologue.mask, block.padding
    if mask is not None:
        x = x * (keeps(mask, x, block.weight.shape[0], block.offsets) * block.prologue.mask_scale)
    if output_size(x, block.weight, block.stride, padding) != tuple(size):  # other zeros below and to the right
        spaces = zip(size, block.stride, block.weight.shape[3:], x.shape[2:], padding, strict=True)
        below, right = ((n - 1) * s + taps - have - before for n, s, taps, have, before in spaces)
        x, padding = F.pad(x, (padding[1], right, padding[0], below)), (0, 0)
    y = finished(conv(x, block.weight, block.bias, block.stride, padding, offsets=block.offsets), block.epilogue)
    y = y if into is None else into.copy_(y)
    if block.epilogue.num_groups:
        taken = group_moments(y, block.epilogue.num_groups)
        if moments is not None:
            moments.copy_(taken)
    return y


def fused(tiling: str) -> Callable[..., Tensor]:
    """All of it in one kernel of ours."""

    def way(*arguments: Any) -> Tensor:
        from fastens.kernels.conv2d import conv2d

        c = Call(*arguments)
        return conv2d(c.block, tiling, c.written())[0]

    return way


def refuses(tiling: str) -> Callable[..., str | None]:
    """Why the kernel does not take it in this tiling, or none."""

    def why(*arguments: Any) -> str | None:
        block, size, into, _ = Call(*arguments)
        x, outputs = block.x, block.weight.shape[1]
        images = [image for image in (x, into, block.prologue.skip) if image is not None]
        if not all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
            return "an image whose channels are not last in memory"
        if x.dtype not in KERNEL_DTYPES or any(t.dtype != x.dtype for t in (*images, block.weight)):
            return "a dtype that the kernel has not, or several"
        if x.numel() == 0:
            return "nothing to compute"
        if tiling == "wide":
            if outputs <= WIDE_OUTPUTS or x.dtype == torch.float64:
                return "no more outputs than an ordinary tile has"
            if size[0] * size[1] < WIDE_PLACES:
                return "a tile of so many images that their moments and maps have no registers beside its sums"
            if (device_of(x).generation or 9) < 9:
                return "a tile of more sums than there are registers before compute capability 9.0"
        return missing_triton(x.device)

    return why


def rule(*arguments: Any) -> str | None:
    """Return the heuristic's choice for a shape first met in graph capture, None for the library's kernel.

    Where the library's several kernels for each member would leave most of the GPU idle, it is one kernel for all;
    Triton's pointer loads reach 140 to 180 % of cuDNN there, and 36 to 71 % on large shapes.
    """
    c = Call(*arguments)
    if not on_gpu(c.block.x) or refuses("auto")(*arguments) is not None:
        return None
    return "triton" if fills_less_than(c.block, c.size, device_of(c.block.x).multiprocessors) else None


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
        HALO: Way(halo, refuses_halo),
    },
    rule=rule,
)
