"""Member-batched two-dimensional convolution with what a residual block does before and behind it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_rows, check_stack
from fastens.program.block import FLAT, ConvBlock, Prologue, flat_schema
from fastens.reference import conv2d as reference
from fastens.reference.group_moments import SPAN


def output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The space of the convolution of x [R, C, *space] by weights [K, O, C, *kernel]."""
    dilation = [1] * len(stride) if dilation is None else dilation
    return tuple(
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    )


def _fake(block: ConvBlock, tiling: str) -> tuple[Tensor, Tensor]:
    x, num_groups = block.x, block.epilogue.num_groups
    rows = x.shape[0] * (block.weight.shape[0] if block.shared else 1)
    height, width = output_size(x, block.weight, block.stride, block.padding)
    size = (rows, block.weight.shape[1], height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shape = (rows, num_groups, (height * width + SPAN - 1) // SPAN, 2) if num_groups else (0,)
    return y, x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


TILINGS = ("auto", "wide", "narrow")
RECORD = (len(FLAT), ConvBlock.from_flat)

_conv2d = Op(
    f"conv2d({flat_schema()}, str tiling) -> (Tensor, Tensor)", reference.conv2d, {"triton": _fake}, record=RECORD
)


def conv2d(block: ConvBlock, tiling: str = "auto", backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Convolve each member's rows, with norm and activation before it and a residual block's additions behind it.

    Args:
        block: what is convolved, and how; shapes are those of the records.
        tiling: how a kernel cuts it, ``"auto"``, ``"wide"`` or ``"narrow"``; results differ in rounding alone.
        backend: the code that runs it.

    Returns:
        [R, O, H', W'], and its moments [R, num_groups, T', 2] or none.

    Raises:
        ValueError: rows that cannot be dealt out to the members, shapes that do not fit, a norm, offsets, skip or
            mask beside ``shared``, parts of a norm without moments, or an unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_block("conv2d", block)
    if tiling not in TILINGS:
        raise ValueError(f"conv2d: tiling {tiling!r} is unknown, expected one of {', '.join(map(repr, TILINGS))}")
    y, moments = _conv2d.resolve(backend, block.tensors())(*block.flat(), tiling)
    return y, moments if block.epilogue.num_groups else None


def check_block(op: str, block: ConvBlock) -> None:
    """Raise unless the shapes of a block fit, and its activations are known."""
    x, weight, prologue, epilogue = block.x, block.weight, block.prologue, block.epilogue
    if x.ndim != 4 or weight.ndim != 5:
        raise ValueError(
            f"{op}: x is {list(x.shape)} and weight {list(weight.shape)}, expected [R, C, H, W] and [K, O, C, h, w]"
        )
    num_members, outputs, channels = weight.shape[:3]
    if not block.shared:
        check_rows(op, x, num_members, block.offsets)
    elif block.offsets is not None or prologue.moments is not None:
        raise ValueError(f"{op}: shared rows have neither offsets nor moments: both are of rows that differ by member")
    elif prologue.skip is not None:
        raise ValueError(f"{op}: shared rows have no skip: shared is for a first layer; give cat([x, skip], 1) as x")
    check_channels(op, x, prologue.skip, channels)
    check_mask(op, x, prologue.mask, num_members, channels, block.shared)
    height, width = output_size(x, weight, block.stride, block.padding)
    if min(height, width) < 1:
        raise ValueError(f"{op}: x is {list(x.shape)}, smaller than the kernel {list(weight.shape[3:])}")
    check_norm(op, x, num_members, prologue)
    if epilogue.num_groups < 0 or (epilogue.num_groups and outputs % epilogue.num_groups):
        raise ValueError(
            f"{op}: num_groups is {epilogue.num_groups}, expected a divisor of the {outputs} output channels"
        )
    for kind in (prologue.activation, epilogue.output_activation):
        check_activation(op, kind, ACTIVATIONS)
    rows = x.shape[0] * (num_members if block.shared else 1)
    check_stack(op, "bias", block.bias, (num_members, outputs))
    check_stack(op, "row_bias", epilogue.row_bias, (rows, outputs), "rows first")
    check_stack(op, "residual", epilogue.residual, (rows, outputs, height, width), "rows first")


def check_channels(op: str, x: Tensor, skip: Tensor | None, channels: int) -> None:
    """Raise unless x [R, C1, H, W], or x and skip [R, C2, H, W] together, have these channels."""
    if skip is None:
        if x.shape[1] != channels:
            raise ValueError(f"{op}: x has {x.shape[1]} channels, weight expects {channels}")
        return
    rows, own, *space = x.shape
    if skip.ndim != 4 or (skip.shape[0], *skip.shape[2:]) != (rows, *space):
        raise ValueError(f"{op}: skip is {list(skip.shape)}, expected {[rows, channels - own, *space]}, as x but C")
    if own + skip.shape[1] != channels:
        raise ValueError(f"{op}: x and skip have {own} + {skip.shape[1]} channels, weight expects {channels}")
    if skip.dtype != x.dtype:
        raise ValueError(f"{op}: skip is {skip.dtype}, expected {x.dtype}, as x")


def check_mask(op: str, x: Tensor, mask: Tensor | None, num_members: int, channels: int, shared: bool) -> None:
    """Raise unless mask has a bit for each element of these channels of x [R, _, H, W], of each row or member."""
    if mask is None:
        return
    if shared:
        raise ValueError(f"{op}: shared rows have no mask: it is of rows that differ by member")
    sizes = [[rows, *x.shape[2:], (channels + 31) // 32] for rows in (x.shape[0], num_members)]
    if list(mask.shape) not in sizes or mask.dtype != torch.int32:
        raise ValueError(f"{op}: mask is {mask.dtype} {list(mask.shape)}, expected int32 {sizes[0]} or {sizes[1]}")


def check_norm(op: str, x: Tensor, num_members: int, prologue: Prologue) -> None:
    """Raise unless the moments and parts of the norm of a prologue fit x, and skip."""
    moments, skip, skip_moments = prologue.moments, prologue.skip, prologue.skip_moments
    if moments is None:
        parts = ("norm_weight", "norm_bias", "scale", "shift", "skip_moments")
        given = [name for name in parts if getattr(prologue, name) is not None]
        given += ["norm_groups"] * (prologue.norm_groups != 0)
        if given:
            raise ValueError(f"{op}: {', '.join(given)} without moments of x; take them by group_moments")
        return
    if (skip is None) != (skip_moments is None):
        raise ValueError(f"{op}: skip and skip_moments belong together where there are moments: give both or neither")
    rows, channels = x.shape[:2]
    spans = (math.prod(x.shape[2:]) + SPAN - 1) // SPAN
    groups = moments.shape[1] if moments.ndim == 4 else 0
    if groups < 1 or channels % groups or tuple(moments.shape) != (rows, groups, spans, 2):
        raise ValueError(
            f"{op}: moments is {list(moments.shape)}, expected [{rows}, G, {spans}, 2] with G groups of {channels} "
            "channels"
        )
    per_group, num_groups = channels // groups, prologue.norm_groups or groups
    if skip is not None and skip_moments is not None:
        shape = (rows, skip.shape[1] // per_group, spans, 2)
        if skip.shape[1] % per_group or tuple(skip_moments.shape) != shape:
            raise ValueError(
                f"{op}: skip_moments is {list(skip_moments.shape)}, expected {list(shape)}, groups of {per_group} of "
                f"skip's {skip.shape[1]} channels, as those of moments"
            )
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups or channels // num_groups % per_group:
        raise ValueError(
            f"{op}: norm_groups is {prologue.norm_groups}, expected a divisor of the {channels} channels whose "
            f"groups are whole groups of moments, of {per_group} channels"
        )
    for name in ("norm_weight", "norm_bias"):
        check_stack(op, name, getattr(prologue, name), (num_members, channels))
    for name in ("scale", "shift"):
        check_stack(op, name, getattr(prologue, name), (rows, channels), "rows first")
