"""Triton kernel of what is before a convolution, as a pass of its own: act(norm(cat([x, skip])) by given moments).

Done on load, each element's norm and activation are computed once for every tap and every tile of output channels; in a
pass they are computed once, for a read and a write of the image.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.kernels._activation import activated
from fastens.kernels._conv2d import norm_of_moments
from fastens.kernels._conv2d_launch import Norm
from fastens.reference.group_moments import SPAN

TILE = 8192  # elements of a tile


@triton.jit
def prepared_kernel(
    x, skip, y, maps, moments, skip_moments, weight, bias, scale, shift, rows_per_member, channels, skip_channels,
    per_group, per_norm, space, span, place_tiles, channel_tiles,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of PLACES places of one row."""
    pid = tl.program_id(0).to(tl.int64)
    channel = (pid % channel_tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    place = pid // channel_tiles % place_tiles * PLACES + tl.arange(0, PLACES)
    row = pid // channel_tiles // place_tiles
    exists = channel < channels
    mask = (place < space)[:, None] & exists[None, :]
    own = channels - skip_channels
    at = (row * space + place)[:, None]
    if moments is not None:
        # every tile of these channels writes the same numbers to the same place, and reads them behind its own barrier:
        # kept in registers, they would be in every thread
        rows = row + tl.arange(0, 1)
        mean, factor, offset = norm_of_moments(
            rows, rows >= 0, channel, exists, row // rows_per_member, moments, skip_moments, weight, bias, scale, shift,
            channels, skip_channels, per_group, per_norm, space, span, eps, SPANS, PARTS, PADDED_PARTS, WIDE,
        )  # fmt: skip
        to = maps + rows[:, None] * 3 * channels + channel[None, :]
        tl.store(to, mean, exists[None, :])
        tl.store(to + channels, factor, exists[None, :])
        tl.store(to + 2 * channels, offset, exists[None, :])
        tl.debug_barrier()
    value = tl.load(x + at * own + channel[None, :], mask & (channel < own)[None, :], other=0.0)
    if skip is not None:
        beyond = tl.load(
            skip + at * skip_channels + (channel - own)[None, :], mask & (channel >= own)[None, :], other=0.0
        )
        value = tl.where((channel < own)[None, :], value, beyond)
    value = value.to(WIDE)
    if maps is not None:
        found = maps + row * 3 * channels + channel
        mean, factor = tl.load(found, exists, other=0.0), tl.load(found + channels, exists, other=0.0)
        offset = tl.load(found + 2 * channels, exists, other=0.0)
        value = (value - mean[None, :]) * factor[None, :] + offset[None, :]
    tl.store(y + at * channels + channel[None, :], activated(value, ACTIVATION).to(y.dtype.element_ty), mask)


def prepared(
    x: Tensor,
    num_members: int,
    skip: Tensor | None,
    moments: Tensor | None,
    skip_moments: Tensor | None,
    norm_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """Return what is convolved, [R, C1 + C2, H, W]; x and skip have their channels last in memory, as the result has.

    The arguments are those of :func:`fastens.ops.conv2d.conv2d`, of members with equally many rows.
    """
    rows, own, height, width = x.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    channels, space = own + skip_channels, height * width
    y = torch.empty(rows, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device(x.device if x.is_cuda else -1):
        norm = Norm.prepare(
            x, moments, norm_weight, norm_bias, scale, shift, eps, None, num_members, skip, skip_moments, norm_groups
        )
        constants = dict(norm.constants)
        if norm.tensors[1] is None:  # no moments to be joined here
            constants["BLOCK"] = min(128, triton.next_power_of_2(channels))
        places = min(triton.next_power_of_2(space), max(1, TILE // constants["BLOCK"]))
        place_tiles, channel_tiles = triton.cdiv(space, places), triton.cdiv(channels, constants["BLOCK"])
        prepared_kernel[(rows * place_tiles * channel_tiles,)](
            x, skip, y, *norm.tensors, max(1, rows // num_members), channels, skip_channels, norm.per_group,
            norm.per_norm, space, SPAN, place_tiles, channel_tiles, PLACES=places, ACTIVATION=activation, WIDE=wide,
            num_warps=max(1, min(8, places * constants["BLOCK"] // 1024)), **constants,
        )  # fmt: skip
    return y
