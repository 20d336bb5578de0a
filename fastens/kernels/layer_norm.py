"""Triton kernel of layer normalisation, its affine map, scale-shift and SiLU.

y = act(((x - mean) / sqrt(var + eps) * w_k + b_k) * (1 + scale_r) + shift_r), mean and var of one vector of N features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._activation import activated
from fastens.kernels._dropout import VARYING, mask_scale, mask_settings, of_rows
from fastens.kernels._into import strided_rows
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import members_of_rows
from fastens.kernels._tiles import cdiv, next_power_of_2

TILE = 8192  # features that one program holds; longer vectors are read in parts, three times


@triton.jit
def finished(
    value, mean, rstd, feature, exists, weight, bias, scale, shift, member, row, length,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise, then the member's map, the row's scale and shift, and the activation."""
    y = (value - mean) * rstd
    own = member * length + feature
    if weight is not None:
        y *= tl.load(weight + own, exists, other=0.0).to(WIDE)
    if bias is not None:
        y += tl.load(bias + own, exists, other=0.0).to(WIDE)
    own = row * length + feature
    if scale is not None:
        y *= 1.0 + tl.load(scale + own, exists, other=0.0).to(WIDE)
    if shift is not None:
        y += tl.load(shift + own, exists, other=0.0).to(WIDE)
    return activated(y, ACTIVATION)


@kernel(do_not_specialize=VARYING)
def layer_norm_kernel(
    x, y, weight, bias, scale, shift, member_of_row, vectors, per_row, rows_per_member, length, x_row, x_vector, y_row,
    y_vector,
    members, samples, evaluation, key_low, key_high,
    eps: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, MASKS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """VECTORS vectors; each is held whole, or read in parts of BLOCK."""
    wait_for_previous()
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)[:, None]
    row = vector // per_row
    member = row // rows_per_member
    if member_of_row is not None:
        member = tl.load(member_of_row + row, vector < vectors, other=0).to(tl.int64)
    drawn, sample = row * 0, row * 0
    if MASKS != "none":
        drawn = tl.load(members + row, vector < vectors, other=0)
        if samples is not None:
            sample = tl.load(samples + row, vector < vectors, other=0) + 1
    before = (vector % per_row) * length  # elements of the row before this vector
    x += row * x_row + vector % per_row * x_vector
    y += row * y_row + vector % per_row * y_vector
    total = tl.cast(length, WIDE)
    if WHOLE:
        feature = tl.arange(0, BLOCK)[None, :]
        mask = (vector < vectors) & (feature < length)
        value = tl.load(x + feature, mask, other=0.0).to(WIDE)
        mean = tl.sum(value, 1)[:, None] / total
        apart = tl.where(mask, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, 1)[:, None] / total + eps)
        result = finished(
            value, mean, rstd, feature, mask, weight, bias, scale, shift, member, row, length, ACTIVATION, WIDE
        )
        if MASKS != "none":
            result *= mask_scale(
                before, drawn, sample, evaluation, key_low, key_high, BLOCK, MASKS, THRESHOLD, SCALE, WIDE
            )
        tl.store(y + feature, result.to(y.dtype.element_ty), mask)
    else:
        mean = tl.zeros([VECTORS, 1], WIDE)
        for start in range(0, length, BLOCK):
            feature = start + tl.arange(0, BLOCK)[None, :]
            mask = (vector < vectors) & (feature < length)
            mean += tl.sum(tl.load(x + feature, mask, other=0.0).to(WIDE), 1)[:, None]
        mean = mean / total
        squares = tl.zeros([VECTORS, 1], WIDE)
        for start in range(0, length, BLOCK):
            feature = start + tl.arange(0, BLOCK)[None, :]
            mask = (vector < vectors) & (feature < length)
            value = tl.load(x + feature, mask, other=0.0).to(WIDE)
            apart = tl.where(mask, value - mean, 0.0)
            squares += tl.sum(apart * apart, 1)[:, None]
        rstd = 1.0 / tl.sqrt(squares / total + eps)
        for start in range(0, length, BLOCK):
            feature = start + tl.arange(0, BLOCK)[None, :]
            mask = (vector < vectors) & (feature < length)
            value = tl.load(x + feature, mask, other=0.0).to(WIDE)
            result = finished(
                value, mean, rstd, feature, mask, weight, bias, scale, shift, member, row, length, ACTIVATION, WIDE
            )
            if MASKS != "none":
                first = before + start
                result *= mask_scale(
                    first, drawn, sample, evaluation, key_low, key_high, BLOCK, MASKS, THRESHOLD, SCALE, WIDE
                )
            tl.store(y + feature, result.to(y.dtype.element_ty), mask)


def layer_norm(
    x: Tensor,
    normalized_shape: list[int],
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
    """Normalise; the arguments are those of ``fastens::layer_norm``.

    ``into`` is where the result is written, whose vectors are contiguous and, within a row, equally far apart; without
    it, the result is contiguous.
    """
    y = x.new_empty(x.shape) if into is None else into
    if x.numel() == 0:
        return y
    rows, length = x.shape[0], math.prod(normalized_shape)
    vectors = x.numel() // length
    x, x_strides = strided_rows(x, len(normalized_shape), copy=True)
    y_strides = strided_rows(y, len(normalized_shape))[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    block = min(TILE, next_power_of_2(length))
    held = max(1, min(16, 2048 // block, next_power_of_2(vectors)))
    num_members = next((t.shape[0] for t in (weight, bias) if t is not None), 1)
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    with device_of(x).current():
        layer_norm_kernel[(cdiv(vectors, held),)](
            x, y, weight, bias, scale, shift, members_of_rows(offsets, num_members, rows, x.device),
            vectors, max(1, vectors // rows), max(1, rows // num_members), length, *x_strides, *y_strides,
            *of_rows(p, members, samples, x.device),
            **mask_settings(p, key, evaluation, samples is not None, math.gcd(length, block)),
            eps=eps, VECTORS=held, BLOCK=block, WHOLE=length <= TILE, ACTIVATION=activation,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32, num_warps=max(1, min(8, held * block // 512)),
        )  # fmt: skip
    return y
