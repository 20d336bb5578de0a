"""Triton kernel of the member-batched linear layer with its activation.

y[r] = act(x[r] W_k^T + b_k) for the rows r of member k; the sums are in float32, or float64 for float64.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of, product_precision
from fastens.kernels._activation import activated
from fastens.kernels._dropout import VARYING, mask_scale, mask_settings, of_rows
from fastens.kernels._into import strided_vectors
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv


@kernel(do_not_specialize=VARYING)
def linear_kernel(
    x, weight, bias, y, first_row, rows_per_member, outputs, inputs, row_tiles, output_tiles, per_row,
    weight_k, weight_out, weight_in, bias_k, x_stride, y_stride, members, samples, evaluation, key_low, key_high,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDENED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKS: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One tile of one member's result; vectors of x and y are contiguous, and equally far apart."""
    wait_for_previous()
    pid = tl.program_id(0)
    tile_n, tile_m, member = pid % output_tiles, (pid // output_tiles) % row_tiles, pid // output_tiles // row_tiles
    begin = member.to(tl.int64) * rows_per_member
    end = begin + rows_per_member
    if first_row is not None:
        begin = tl.load(first_row + member) * per_row
        end = tl.load(first_row + member + 1) * per_row
    row = begin + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if begin + tile_m * BLOCK_M < end:
        acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
        own = weight + member.to(tl.int64) * weight_k + column.to(tl.int64)[None, :] * weight_out
        for start in range(0, inputs, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                x + row[:, None] * x_stride + depth[None, :],
                (row < end)[:, None] & (depth < inputs)[None, :],
                other=0.0,
            )
            b = tl.load(
                own + depth.to(tl.int64)[:, None] * weight_in,
                (depth < inputs)[:, None] & (column < outputs)[None, :],
                other=0.0,
            )
            a = a.to(b.dtype)
            if WIDENED:
                a, b = a.to(WIDE), b.to(WIDE)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
        if bias is not None:
            acc += tl.load(bias + member.to(tl.int64) * bias_k + column, column < outputs, other=0.0).to(WIDE)[None, :]
        acc = activated(acc, ACTIVATION)
        if MASKS != "none":
            vector = row[:, None]
            drawn = tl.load(members + vector // per_row, vector < end, other=0)
            sample = drawn * 0
            if samples is not None:
                sample = tl.load(samples + vector // per_row, vector < end, other=0) + 1
            first = (vector % per_row) * outputs + tile_n * BLOCK_N
            acc *= mask_scale(
                first, drawn, sample, evaluation, key_low, key_high, BLOCK_N, MASKS, THRESHOLD, SCALE, WIDE
            )
        mask = (row < end)[:, None] & (column < outputs)[None, :]
        tl.store(y + row[:, None] * y_stride + column[None, :], acc.to(y.dtype.element_ty), mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
    into: Tensor | None = None,
) -> Tensor:
    """Apply each member's layer; the arguments are those of ``fastens::linear``.

    ``into`` is where the result is written, whose vectors are contiguous and equally far apart. An x of another dtype
    than the weights is rounded to theirs as it is read.
    """
    num_members, outputs, inputs = weight.shape
    dtype = weight.dtype
    y = x.new_empty(*x.shape[:-1], outputs, dtype=dtype) if into is None else into
    if y.numel() == 0:
        return y
    x, x_stride = strided_vectors(x, copy=True)
    y_stride = strided_vectors(y)[1]
    vectors = y.numel() // outputs
    per_member = vectors // num_members
    per_row = vectors // x.shape[0]
    wide = dtype == torch.float64
    block_m, block_n, block_k, num_warps, num_stages = tiles(per_member, outputs, dtype)
    if p:  # the words of the masks need registers that a tile of 128 columns does not leave
        block_n = min(block_n, 64)
    row_tiles = cdiv(vectors if offsets is not None else per_member, block_m)
    output_tiles = cdiv(outputs, block_n)
    if bias is not None and bias.stride(1) != 1:
        bias = bias.contiguous()
    first_row = None if offsets is None else offsets.to(x.device, non_blocking=True)
    tf32 = dtype == torch.float32 and product_precision() == "tf32"
    with device_of(x).current():
        linear_kernel[(num_members * row_tiles * output_tiles,)](
            x, weight, bias, y, first_row, per_member, outputs, inputs,
            row_tiles, output_tiles, per_row, *weight.stride(), 0 if bias is None else bias.stride(0), x_stride,
            y_stride,
            *of_rows(p, members, samples, x.device),
            **mask_settings(p, key, evaluation, samples is not None, outputs),
            ACTIVATION=activation, PRECISION="tf32" if tf32 else "ieee", WIDE=tl.float64 if wide else tl.float32,
            WIDENED=dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return y


def tiles(rows: int, outputs: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Tile sizes, warps and stages: narrow tiles for few rows, where reading the weights is the work."""
    block_m = min(128, max(16, 1 << (rows - 1).bit_length()))
    block_n = min(128 if block_m >= 64 else 32, max(16, 1 << (outputs - 1).bit_length()))
    if dtype.itemsize == 2:
        return block_m, block_n, 64, 8 if block_m * block_n >= 16384 else 4, 3
    if dtype == torch.float32:  # products in full precision run outside the tensor cores: fewer per thread
        return min(block_m, 64), min(block_n, 64), 32, 4, 2
    return min(block_m, 32), min(block_n, 32), 16, 4, 1
