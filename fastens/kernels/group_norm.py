"""Triton kernels of group normalisation, its affine map, scale-shift and SiLU, in any dense layout.

y = act(((x - mean) / sqrt(var + eps) * w_k + b_k) * (1 + scale_r) + shift_r), mean and var of a row's group.

A tile is a bundle of groups times a span of the space. Where one tile holds whole groups, one kernel reads x once; else
each span leaves its mean and sum of squares (Chan et al., "Updating formulae and a pairwise algorithm for computing
sample variances", 1979), and a second kernel reads them and x again.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._activation import activated
from fastens.kernels._dropout import VARYING, mask_scale, mask_settings, of_rows
from fastens.kernels._into import strided_images
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._normalise import normalise as normalise  # of moments that are known: one concept, two files
from fastens.kernels._rows import members_of_rows
from fastens.kernels._tiles import cdiv, next_power_of_2

WHOLE = 16384  # elements of a tile that holds whole groups: 32 registers of each of 512 threads in float32
PART = 4096  # elements of a tile that holds a span of a group too large for one
SECTOR = 32  # bytes that one memory transaction moves at least


@triton.jit
def tile_of(
    sample, bundle, span, channels, space, stride_r, stride_c, stride_s,
    CG: tl.constexpr, NG: tl.constexpr, PADDED_CG: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Channels [NG * PADDED_CG], which of them exist, places [SPAN], and offsets within x and mask of both."""
    each = tl.arange(0, NG * PADDED_CG)
    if CG == PADDED_CG:
        channel = bundle * NG * CG + each
        exists = channel < channels
    else:  # one group
        channel = bundle * CG + each
        exists = each < CG
    place = span * SPAN + tl.arange(0, SPAN)
    offs = sample * stride_r + channel[:, None] * stride_c + place[None, :] * stride_s
    return channel, exists, place, offs, exists[:, None] & (place < space)[None, :]


@triton.jit
def per_group(values, NG: tl.constexpr, PADDED_CG: tl.constexpr):
    """The sum over each group's channels: [NG * PADDED_CG] -> [NG]."""
    return tl.sum(tl.reshape(values, [NG, PADDED_CG]), 1)


@triton.jit
def per_channel(values, NG: tl.constexpr, PADDED_CG: tl.constexpr):
    """Each group's value for each of its channels: [NG] -> [NG * PADDED_CG, 1]."""
    # by way of one dimension: reshaped to a column, its layout would spread to the tile, all of it in every thread
    return tl.reshape(tl.broadcast_to(values[:, None], [NG, PADDED_CG]), [NG * PADDED_CG])[:, None]


@triton.jit
def moments(x, mask, count, NG: tl.constexpr, PADDED_CG: tl.constexpr):
    """Mean and sum of squared differences from it, [NG], of the groups of a tile."""
    mean = per_group(tl.sum(x, 1), NG, PADDED_CG) / count
    apart = tl.where(mask, x - per_channel(mean, NG, PADDED_CG), 0.0)
    return mean, per_group(tl.sum(apart * apart, 1), NG, PADDED_CG)


@triton.jit
def finished(
    x, mean, rstd, channel, exists, weight, bias, scale, shift, member, row, channels, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise, then the member's map, the row's scale and shift, and the activation."""
    y = (x - mean) * rstd
    own = member * channels + channel
    if weight is not None:
        y *= tl.load(weight + own, exists, other=0.0).to(WIDE)[:, None]
    if bias is not None:
        y += tl.load(bias + own, exists, other=0.0).to(WIDE)[:, None]
    own = row * channels + channel
    if scale is not None:
        y *= (1.0 + tl.load(scale + own, exists, other=0.0).to(WIDE))[:, None]
    if shift is not None:
        y += tl.load(shift + own, exists, other=0.0).to(WIDE)[:, None]
    return activated(y, ACTIVATION)


@kernel
def partial_kernel(
    x, partial, channels, groups, space, bundles, stride_r, stride_c, stride_s,
    CG: tl.constexpr, NG: tl.constexpr, PADDED_CG: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """partial[r, g, span] = mean and sum of squared differences of one span of a group."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    span, bundle, row = pid % SPANS, (pid // SPANS) % bundles, pid // SPANS // bundles
    _, _, _, offs, mask = tile_of(
        row, bundle, span, channels, space, stride_r, stride_c, stride_s, CG, NG, PADDED_CG, SPAN
    )
    value = tl.load(x + offs, mask, other=0.0).to(WIDE)
    count = (tl.minimum(SPAN, space - span * SPAN) * CG).to(WIDE)
    mean, squares = moments(value, mask, count, NG, PADDED_CG)
    group = bundle * NG + tl.arange(0, NG)
    at = ((row * groups + group) * SPANS + span) * 2
    tl.store(partial + at, mean, group < groups)
    tl.store(partial + at + 1, squares, group < groups)


@kernel(do_not_specialize=VARYING)
def group_norm_kernel(
    x, y, partial, weight, bias, scale, shift, member_of_row, channels, groups, space, bundles, stride_r, stride_c,
    stride_s, y_stride_r, y_stride_c, y_stride_s, rows_per_member, members, samples, evaluation, key_low, key_high,
    eps: tl.constexpr, CG: tl.constexpr, NG: tl.constexpr, PADDED_CG: tl.constexpr, SPAN: tl.constexpr,
    SPANS: tl.constexpr, PADDED_SPANS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    MASKS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One tile of the result; the moments are the tile's own, or joined from those of the group's spans."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    span, bundle, row = pid % SPANS, (pid // SPANS) % bundles, pid // SPANS // bundles
    channel, exists, place, offs, mask = tile_of(
        row, bundle, span, channels, space, stride_r, stride_c, stride_s, CG, NG, PADDED_CG, SPAN
    )
    value = tl.load(x + offs, mask, other=0.0).to(WIDE)
    total = tl.cast(space * CG, WIDE)
    if SPANS == 1:
        mean, squares = moments(value, mask, total, NG, PADDED_CG)
    else:
        group = bundle * NG + tl.arange(0, NG)[:, None]
        each = tl.arange(0, PADDED_SPANS)[None, :]
        found = (group < groups) & (each < SPANS)
        at = ((row * groups + group) * SPANS + each) * 2
        means = tl.load(partial + at, found, other=0.0)
        counts = tl.where(found, tl.minimum(SPAN, space - each * SPAN) * CG, 0).to(WIDE)
        mean = tl.sum(means * counts, 1) / total
        apart = tl.where(found, means - mean[:, None], 0.0)
        squares = tl.sum(tl.load(partial + at + 1, found, other=0.0) + counts * apart * apart, 1)
    rstd = per_channel(1.0 / tl.sqrt(squares / total + eps), NG, PADDED_CG)
    mean = per_channel(mean, NG, PADDED_CG)
    member = row // rows_per_member
    if member_of_row is not None:
        member = tl.load(member_of_row + row).to(tl.int64)
    result = finished(
        value, mean, rstd, channel, exists, weight, bias, scale, shift, member, row, channels, ACTIVATION, WIDE
    )
    if MASKS != "none":
        drawn = tl.load(members + row)
        sample = drawn * 0
        if samples is not None:
            sample = tl.load(samples + row) + 1
        first = channel[:, None] * space + span * SPAN
        result *= mask_scale(first, drawn, sample, evaluation, key_low, key_high, SPAN, MASKS, THRESHOLD, SCALE, WIDE)
    to = row * y_stride_r + channel[:, None] * y_stride_c + place[None, :] * y_stride_s
    tl.store(y + to, result.to(y.dtype.element_ty), mask)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
    into: Tensor | None = None,
) -> Tensor:
    """Normalise; the arguments are those of ``fastens::group_norm``, ``into`` is where the result is written.

    Where no place is given, the result has the layout of x, and is contiguous where that is not dense.
    """
    y = into
    if y is None:
        y = torch.empty_like(x) if x.is_contiguous() or channels_last(x) else x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    rows, channels = x.shape[:2]
    space = x.shape[2:].numel()
    x, strides = strided_images(x, copy=True)
    y_strides = strided_images(y)[1]
    stride_c = strides[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    groups, cg = num_groups, channels // num_groups
    padded = next_power_of_2(cg)
    bundled, whole = 1, next_power_of_2(space)
    if stride_c == 1 and padded == cg:  # neighbouring groups in one tile, so that it is as wide as memory transactions
        limit = WHOLE if padded * whole <= WHOLE else PART
        while bundled < groups and bundled * cg * x.element_size() < 2 * SECTOR and 2 * bundled * padded <= limit:
            bundled *= 2
        while bundled * cg * x.element_size() > SECTOR and limit == WHOLE and bundled * padded * whole > WHOLE:
            bundled //= 2
    span = whole if bundled * padded * whole <= WHOLE else max(1, PART // (bundled * padded))
    spans, bundles = cdiv(space, span), cdiv(groups, bundled)
    num_warps = max(1, min(16, span * bundled * padded // 1024))
    num_members = next((t.shape[0] for t in (weight, bias) if t is not None), 1)
    member_of_row = members_of_rows(offsets, num_members, rows, x.device)
    grid = (rows * bundles * spans,)
    shape = {
        "CG": cg,
        "NG": bundled,
        "PADDED_CG": padded,
        "SPAN": span,
        "SPANS": spans,
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        "num_warps": num_warps,
    }
    sizes = (channels, groups, space, bundles, *strides)
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    with device_of(x).current():
        partial = None
        if spans > 1:
            partial = torch.empty(rows, groups, spans, 2, dtype=wide, device=x.device)
            partial_kernel[grid](x, partial, *sizes, **shape)
        group_norm_kernel[grid](
            x, y, partial, weight, bias, scale, shift, member_of_row, *sizes, *y_strides, max(1, rows // num_members),
            *of_rows(p, members, samples, x.device),
            **mask_settings(p, key, evaluation, samples is not None, math.gcd(space, span)),
            eps=eps, PADDED_SPANS=next_power_of_2(spans), ACTIVATION=activation, **shape,
        )  # fmt: skip
    return y


def channels_last(x: Tensor) -> bool:
    """Whether channels, and not space, are next to each other in memory."""
    inner = x.movedim(1, -1)
    return not x.is_contiguous() and inner.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x where it is contiguous with channels first or last, or a contiguous copy."""
    return x if x.is_contiguous() or channels_last(x) else x.contiguous()
