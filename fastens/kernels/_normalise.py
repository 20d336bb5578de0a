"""Triton kernel of a group norm whose moments are known: one pass that reads an image and writes it normalised.

y = act(((x - mean) / sqrt(var + eps) * w_k + b_k) * (1 + scale_r) + shift_r), mean and var of a row's group, joined
from the moments of its spans and sub-groups (Chan et al., "Updating formulae and a pairwise algorithm for computing
sample variances", 1979). The image may be two, the channels of the second behind those of the first; a group may
straddle them.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false, reportArgumentType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._activation import activated
from fastens.kernels._into import strided_images
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import members_of_rows
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.program.block import Prologue
from fastens.reference.group_moments import SPAN

TILE = 8192  # elements of an image that a program normalises: 32 registers of each of 256 threads in float32
MOST_MOMENTS = 1024  # that a program joins beside it; more are joined once, by a launch before
PART = 4096  # moments that are held at a time


@triton.jit
def joined(
    moments, skip_moments, row, group, groups, first, second, space, span,
    PARTS: tl.constexpr, SPANS: tl.constexpr, PER_PART: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared differences from it of groups [HELD], each of PARTS sub-groups of SPANS spans."""
    each = tl.arange(0, BLOCK)[None, :]
    total = tl.cast(space * (PARTS * PER_PART), WIDE)
    mean = tl.zeros([HELD], WIDE)
    squares = tl.zeros([HELD], WIDE)
    for again in tl.static_range(2):  # the mean, then what is around it
        for start in range(0, PARTS * SPANS, BLOCK):
            number = start + each
            part = group[:, None] * PARTS + number // SPANS
            place = number % SPANS
            found = (group < groups)[:, None] & (number < PARTS * SPANS)
            counts = tl.where(found, tl.minimum(span, space - place * span) * PER_PART, 0).to(WIDE)
            at = ((row * first + part) * SPANS + place) * 2
            if skip_moments is None:
                means = tl.load(moments + at, found, other=0.0)
            else:
                behind = ((row * second + part - first) * SPANS + place) * 2
                means = tl.load(moments + at, found & (part < first), other=0.0)
                means += tl.load(skip_moments + behind, found & (part >= first), other=0.0)
            if again == 0:
                mean += tl.sum(means * counts, 1) / total
            else:
                if skip_moments is None:
                    scatter = tl.load(moments + at + 1, found, other=0.0)
                else:
                    scatter = tl.load(moments + at + 1, found & (part < first), other=0.0)
                    scatter += tl.load(skip_moments + behind + 1, found & (part >= first), other=0.0)
                apart = tl.where(found, means - mean[:, None], 0.0)
                squares += tl.sum(scatter + counts * apart * apart, 1)
    return mean, squares


@kernel
def join_moments_kernel(
    moments, skip_moments, whole, groups, first, second, space, span,
    PARTS: tl.constexpr, SPANS: tl.constexpr, PER_PART: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """whole[r, g] = the moments of a whole group."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    group = pid % groups + tl.arange(0, 1)
    mean, squares = joined(
        moments, skip_moments, pid // groups, group, groups, first, second, space, span, PARTS, SPANS, PER_PART, 1,
        BLOCK, WIDE,
    )  # fmt: skip
    at = whole + pid * 2 + tl.arange(0, 1)
    tl.store(at, mean)
    tl.store(at + 1, squares)


@kernel
def normalise_kernel(
    x, skip, y, moments, skip_moments, weight, bias, scale, shift, member_of_row, rows_per_member, channels,
    own_channels, groups, first, second, space, span, channel_tiles, space_tiles, x_r, x_c, x_s, skip_r, skip_c, skip_s,
    y_r, y_c, y_s,
    eps: tl.constexpr, PER_GROUP: tl.constexpr, PARTS: tl.constexpr, SPANS: tl.constexpr, HELD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_S places of one row."""
    wait_for_previous()
    pid = tl.program_id(0)
    place = (pid // channel_tiles % space_tiles).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    row = (pid // channel_tiles // space_tiles).to(tl.int64)
    start = pid % channel_tiles * BLOCK_C
    of_group = (start + tl.arange(0, BLOCK_C)) // PER_GROUP - start // PER_GROUP
    channel = start.to(tl.int64) + tl.arange(0, BLOCK_C)
    exists = channel < channels
    mask = exists[:, None] & (place < space)
    if skip is None:
        value = tl.load(x + row * x_r + channel[:, None] * x_c + place * x_s, mask, other=0.0).to(WIDE)
    else:
        mine = (channel < own_channels)[:, None]
        value = tl.load(x + row * x_r + channel[:, None] * x_c + place * x_s, mask & mine, other=0.0).to(WIDE)
        at = row * skip_r + (channel - own_channels)[:, None] * skip_c + place * skip_s
        value += tl.load(skip + at, mask & (channel >= own_channels)[:, None], other=0.0).to(WIDE)
    held = tl.arange(0, HELD)
    mean, squares = joined(
        moments, skip_moments, row, start // PER_GROUP + held, groups, first, second, space, span, PARTS, SPANS,
        PER_GROUP // PARTS, HELD, BLOCK, WIDE,
    )  # fmt: skip
    rstd = 1.0 / tl.sqrt(squares / tl.cast(space * PER_GROUP, WIDE) + eps)
    own = of_group[:, None] == held[None, :]
    mean = tl.sum(tl.where(own, mean[None, :], 0.0), 1)
    factor = tl.sum(tl.where(own, rstd[None, :], 0.0), 1)
    member = row // rows_per_member
    if member_of_row is not None:
        member = tl.load(member_of_row + row).to(tl.int64)
    added = tl.zeros([BLOCK_C], WIDE)
    if weight is not None:
        factor *= tl.load(weight + member * channels + channel, exists, other=0.0).to(WIDE)
    if bias is not None:
        added += tl.load(bias + member * channels + channel, exists, other=0.0).to(WIDE)
    if scale is not None:
        larger = 1.0 + tl.load(scale + row * channels + channel, exists, other=0.0).to(WIDE)
        factor *= larger
        added *= larger
    if shift is not None:
        added += tl.load(shift + row * channels + channel, exists, other=0.0).to(WIDE)
    result = activated((value - mean[:, None]) * factor[:, None] + added[:, None], ACTIVATION)
    tl.store(y + row * y_r + channel[:, None] * y_c + place * y_s, result.to(y.dtype.element_ty), mask)


def normalise(x: Tensor, prologue: Prologue, offsets: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """Normalise by moments that were taken before: one launch, or two where a group has very many spans.

    Args:
        x: [R, C1, *space], rows grouped by member.
        prologue: of a convolution, with moments and without a mask.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        into: [R, C1 + C2, *space] to write to, of any dtype and strides; none for memory laid out as x is.

    Raises:
        ValueError: groups of the moments that do not make up those of the norm, or ``into`` whose places are not
            equally far apart.
    """
    skip, moments, skip_moments = prologue.skip, prologue.moments, prologue.skip_moments
    if moments is None:
        raise ValueError("normalise: no moments of x; take them by group_moments")
    rows, own_channels = x.shape[:2]
    channels = own_channels + (0 if skip is None else skip.shape[1])
    first, second = moments.shape[1], 0 if skip_moments is None else skip_moments.shape[1]
    norm_groups = prologue.norm_groups or first + second
    if (
        channels % norm_groups or (first + second) % norm_groups or own_channels * (first + second) != channels * first
        or (skip is None) is not (skip_moments is None)
    ):  # fmt: skip
        raise ValueError(
            f"normalise: moments of {first} + {second} groups of {own_channels} + {channels - own_channels} channels "
            f"do not make up {norm_groups} groups of a norm"
        )
    if into is None:
        whole = x.new_empty(rows, *x.shape[2:], channels).movedim(-1, 1)
        into = whole if x.stride(1) == 1 else whole.contiguous()
    if into.numel() == 0:
        return into
    space, parts, spans = x.shape[2:].numel(), (first + second) // norm_groups, moments.shape[2]
    x, x_strides = strided_images(x, copy=True)
    skip_strides = (0, 0, 0)
    if skip is not None:
        skip, skip_strides = strided_images(skip, copy=True)
    y_strides = strided_images(into)[1]
    wide = tl.float64 if moments.dtype == torch.float64 else tl.float32
    maps = (prologue.norm_weight, prologue.norm_bias, prologue.scale, prologue.shift)
    moments, skip_moments, weight, bias, scale, shift = (
        None if t is None else t.contiguous() for t in (moments, skip_moments, *maps)
    )
    per_group, span = channels // norm_groups, SPAN
    by_channel = x_strides[1] == 1 and own_channels > 1
    block_c = min(128 if by_channel else 32, next_power_of_2(channels))
    block_s = min(TILE // 2 // block_c, next_power_of_2(space))
    held = next_power_of_2(
        cdiv(block_c, per_group) if block_c % per_group == 0 else min(norm_groups, (block_c - 2) // per_group + 2)
    )
    num_members = next((t.shape[0] for t in (weight, bias) if t is not None), 1)
    with device_of(x).current():
        if held * parts * spans > MOST_MOMENTS and parts * spans > 1:
            assert moments is not None
            whole = moments.new_empty(rows, norm_groups, 1, 2)
            join_moments_kernel[(rows * norm_groups,)](
                moments, skip_moments, whole, norm_groups, first, second, space, span, PARTS=parts, SPANS=spans,
                PER_PART=per_group // parts, BLOCK=min(PART, next_power_of_2(parts * spans)), WIDE=wide,
            )  # fmt: skip
            moments, skip_moments, first, second, parts, spans, span = whole, None, norm_groups, 0, 1, 1, space
        block = min(max(1, PART // held), next_power_of_2(parts * spans))
        channel_tiles, space_tiles = cdiv(channels, block_c), cdiv(space, block_s)
        normalise_kernel[(rows * channel_tiles * space_tiles,)](
            x, skip, into, moments, skip_moments, weight, bias, scale, shift,
            members_of_rows(offsets, num_members, rows, x.device), max(1, rows // num_members), channels, own_channels,
            norm_groups, first, second, space, span, channel_tiles, space_tiles, *x_strides, *skip_strides, *y_strides,
            eps=prologue.eps, PER_GROUP=per_group, PARTS=parts, SPANS=spans, HELD=held, BLOCK=block, BLOCK_C=block_c,
            BLOCK_S=block_s, ACTIVATION=prologue.activation, WIDE=wide,
            num_warps=max(1, min(8, block_c * block_s // 512)),
        )  # fmt: skip
    return into
