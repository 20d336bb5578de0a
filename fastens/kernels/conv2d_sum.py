"""Triton kernel of a convolution that is summed over members as it is computed, and writes only their sum.

y[b] = sum_k m_k (conv(prepared(x[k B + b]), W_k) + b_k): the members are part of the sum, as its outermost steps, so
that no member's output is written or read. Norm, layout and splits are those of :mod:`fastens.kernels.conv2d`.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import convolution_precision, device_of
from fastens.kernels._conv2d import channels_of_steps, finish, joined, place_of_tile, products, write_maps
from fastens.kernels._conv2d_launch import Norm, tiles_for
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._members import on_device
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN


@kernel
def conv2d_sum_kernel(
    x, weight, bias, member_weights, y, workspace, arrivals, maps, moments, norm_weight, norm_bias, scale, shift,
    members, rows, channels, outputs, height, width, out_height, out_width, down, right, above, before, row_tiles,
    place_tiles, output_tiles, steps, steps_per_split, per_group, per_norm, span, weight_k, weight_o, weight_c,
    weight_h, weight_w,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDENED: tl.constexpr,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One tile of the result, or of one split of its sum."""
    wait_for_previous()
    zero, _, first_row, _, row, row_exists, at_row, place, valid, first_column, place_tile = place_of_tile(
        None, rows, row_tiles, place_tiles, output_tiles, out_height, out_width, ROWS, PLACES, BLOCK_N
    )
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, members * steps)
    first_member, last_member = first // steps, tl.cdiv(last, steps)  # whose steps these are
    if moments is not None:
        # every tile of a row writes the same numbers to the same place, and reads them behind its own barrier
        for k in range(first_member, last_member):
            member = zero + k
            begin_channel, end_channel = channels_of_steps(
                tl.maximum(first - k * steps, 0), tl.minimum(last - k * steps, steps), channels, 0, TAPS_H * TAPS_W,
                BLOCK_K,
            )  # fmt: skip
            write_maps(
                maps, row + member * rows, row_exists, member, begin_channel, end_channel, moments, None, norm_weight,
                norm_bias, scale, shift, channels, 0, per_group, per_norm, height * width, span, eps, SPANS, PARTS,
                PADDED_PARTS, BLOCK, WIDE,
            )  # fmt: skip
        tl.debug_barrier()
    total = tl.zeros([ROWS * PLACES, BLOCK_N], WIDE)
    for k in range(first_member, last_member):
        member = zero + k
        acc = products(
            tl.zeros([ROWS * PLACES, BLOCK_N], WIDE), x, None, weight + member * weight_k, maps, None, at_row,
            first_row + member * rows, first_row + member * rows, row_exists, place, valid, place_tile, first_column,
            tl.maximum(first - k * steps, 0), tl.minimum(last - k * steps, steps), channels, 0, outputs, height, width,
            out_width, down, right, above, before, weight_o, weight_c, weight_h, weight_w, 1.0, 1, ACTIVATION,
            PRECISION, WIDE, WIDENED, TAPS_H, TAPS_W, ROWS, PLACES, BLOCK_K, EVEN_K, EVEN_N, OFFSET,
        )  # fmt: skip
        if bias is not None:  # from the split that begins the member
            column = first_column + tl.arange(0, BLOCK_N)
            begins = (first <= k * steps) & (k * steps < last) & (column < outputs)
            acc += tl.load(bias + member * outputs + column, begins, other=0.0).to(WIDE)[None, :]
        member_weight = tl.load(member_weights + k)
        total += tl.where(member_weight != 0, acc * member_weight, 0.0)  # NaN of a member that is not used stays out
    arrived_last = True
    if SPLITS > 1:
        total, arrived_last = joined(total, workspace, arrivals, SPLITS, ROWS * PLACES, BLOCK_N, WIDE)
    if arrived_last:
        finish(
            total, y, None, None, None, None, zero, row, row_exists, at_row, place, valid, first_column, outputs,
            out_height * out_width, place_tile, place_tiles, 1.0, "none", WIDE, ROWS, PLACES, BLOCK_N, 1, BLOCK_N,
        )  # fmt: skip


def conv2d_sum(block: ConvBlock, member_weights: list[float]) -> Tensor:
    """Convolve and sum; the arguments are those of ``fastens::conv2d_sum``. The result has its channels last."""
    block = block.channels_last()
    x, weight = block.x, block.weight
    num_members, outputs, channels, taps_h, taps_w = weight.shape
    rows = x.shape[0] // num_members
    height, width = x.shape[2:]
    y = block.result(rows=rows)
    out_height, out_width = y.shape[2:]
    if y.numel() == 0:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    space, taps = out_height * out_width, taps_h * taps_w
    normed = block.prologue.moments is not None
    tiles = tiles_for(x, 1, rows, space, outputs, (channels,), taps, 0, sums=num_members, normed=normed)
    row_tiles, place_tiles = cdiv(rows, tiles.rows), cdiv(space, tiles.places)
    output_tiles = cdiv(outputs, tiles.block_n)
    programs = row_tiles * place_tiles * output_tiles
    steps = taps * tiles.blocks((channels,))
    wide_type = tl.float64 if wide == torch.float64 else tl.float32
    tf32 = x.dtype == torch.float32 and convolution_precision() == "tf32"
    cut = {"ROWS": tiles.rows, "PLACES": tiles.places, "BLOCK_N": tiles.block_n, "SPLITS": tiles.splits}
    with device_of(x).current():
        norm = Norm.prepare(block, tiles)
        maps, in_moments, _, *norm_maps = norm.tensors
        workspace, arrivals = tiles.meeting(programs, y)
        conv2d_sum_kernel[(programs, tiles.splits)](
            x, weight, None if block.bias is None else block.bias.contiguous(),
            on_device(tuple(member_weights), wide, x.device), y, workspace, arrivals, maps, in_moments, *norm_maps,
            num_members, rows, channels, outputs, height, width, out_height, out_width, *block.stride,
            *block.padding, row_tiles, place_tiles, output_tiles, steps,
            cdiv(num_members * steps, tiles.splits), norm.per_group, norm.per_norm, SPAN, *weight.stride(),
            ACTIVATION=block.prologue.activation, PRECISION="tf32" if tf32 else "ieee", WIDE=wide_type,
            WIDENED=x.dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
            TAPS_H=taps_h, TAPS_W=taps_w, BLOCK_K=tiles.block_k, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, **norm.constants, **cut,
            **tiles.evenness(x, (channels,), y, weight, block.stride),
        )  # fmt: skip
    return y
