"""Triton kernel of the member-batched two-dimensional convolution, as an implicit matrix product over NHWC memory.

y[r] = act((conv(prepared(x[r]), W_k) + b_k + row_bias[r] + residual[r]) * output_scale) for the rows r of member k,
where prepared(x) is x, or the group norm of x by given moments, its maps, and an activation, computed as x is loaded.
The sums are in float32, or float64 for float64. Where tiles are too few to fill the GPU, each sum is split: parts go to
a workspace, and the last program of a tile to arrive adds them in order, so that results do not depend on timing.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import convolution_precision, device_of
from fastens.kernels._conv2d import (
    PART,
    channels_of_steps,
    finish,
    has_whole_groups,
    joined,
    place_of_tile,
    products,
    write_maps,
)
from fastens.kernels._conv2d_launch import COLUMNS, Norm, tiles_for
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv
from fastens.kernels.group_moments import group_moments
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN, counts


@kernel
def conv2d_kernel(
    x, skip, mask, weight, bias, y, workspace, arrivals, maps, in_moments, skip_moments, norm_weight, norm_bias, scale,
    shift, row_bias, residual, out_moments, first_row, rows_per_member, channels, skip_channels, outputs, height, width,
    out_height, out_width, down, right, above, before, row_tiles, place_tiles, output_tiles, steps, steps_per_split,
    per_group, per_norm, span, weight_k, weight_o, weight_c, weight_h, weight_w,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    mask_scale: tl.constexpr, MASK_WORDS: tl.constexpr, MASK_BY_MEMBER: tl.constexpr, ACTIVATION: tl.constexpr,
    output_scale: tl.constexpr, OUTPUT_ACTIVATION: tl.constexpr, SHARED: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDENED: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, OFFSET: tl.constexpr, PER_GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One tile of one member's result, or of one split of its sum."""
    wait_for_previous()
    member, begin, first, end, row, row_exists, at_row, place, valid, first_column, place_tile = place_of_tile(
        first_row, rows_per_member, row_tiles, place_tiles, output_tiles, out_height, out_width, ROWS, PLACES, BLOCK_N
    )
    if first < end:
        split = tl.program_id(1)
        x_first = first
        if SHARED:
            x_first = first - begin
        mask_row = at_row
        if MASK_BY_MEMBER:
            mask_row = tl.zeros_like(at_row) + member
        begin_step = split * steps_per_split
        end_step = tl.minimum(begin_step + steps_per_split, steps)
        if in_moments is not None:
            # every tile of a row writes the same numbers to the same place, and reads them behind its own barrier
            begin_channel, end_channel = channels_of_steps(
                begin_step, end_step, channels, skip_channels, TAPS_H * TAPS_W, BLOCK_K
            )
            write_maps(
                maps, row, row_exists, member, begin_channel, end_channel, in_moments, skip_moments, norm_weight,
                norm_bias, scale, shift, channels, skip_channels, per_group, per_norm, height * width, span, eps, SPANS,
                PARTS, PADDED_PARTS, BLOCK, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
        acc = products(
            tl.zeros([ROWS * PLACES, BLOCK_N], WIDE), x, skip, weight + member * weight_k, maps, mask, mask_row,
            x_first, first, row_exists, place, valid, place_tile, first_column, begin_step, end_step, channels,
            skip_channels, outputs, height, width, out_width, down, right, above, before, weight_o, weight_c, weight_h,
            weight_w, mask_scale, MASK_WORDS, ACTIVATION, PRECISION, WIDE, WIDENED, TAPS_H, TAPS_W, ROWS, PLACES,
            BLOCK_K, EVEN_K, EVEN_N, OFFSET,
        )  # fmt: skip
        last = True
        if SPLITS > 1:
            acc, last = joined(acc, workspace, arrivals, SPLITS, ROWS * PLACES, BLOCK_N, WIDE)
        if last:
            finish(
                acc, y, bias, row_bias, residual, out_moments, member, row, row_exists, at_row, place, valid,
                first_column, outputs, out_height * out_width, place_tile, place_tiles, output_scale,
                OUTPUT_ACTIVATION, WIDE, ROWS, PLACES, BLOCK_N, PER_GROUP, PART,
            )  # fmt: skip


def conv2d(
    block: ConvBlock, tiling: str = "auto", into: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve; the arguments are those of ``fastens::conv2d``. The result has its channels last in memory.

    ``into`` is where result and moments are written. Its size says how many zeros are below and to the right.
    """
    block = block.channels_last()
    x, weight, offsets, epilogue = block.x, block.weight, block.offsets, block.epilogue
    skip, mask, num_groups = block.prologue.skip, block.prologue.mask, epilogue.num_groups
    skip_channels = 0 if skip is None else skip.shape[1]
    num_members, outputs, channels, taps_h, taps_w = weight.shape
    rows = x.shape[0] * num_members if block.shared else x.shape[0]
    height, width = x.shape[2:]
    y, found = into or (block.result(), None)
    out_height, out_width = y.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    space = out_height * out_width
    if found is None:
        found = x.new_empty((rows, num_groups, len(counts(space)), 2) if num_groups else 0, dtype=wide)
    if y.numel() == 0:
        return y, found
    per_member = rows // num_members
    most = rows if offsets is not None else per_member
    sources = (x.shape[1], skip_channels)
    per_group = outputs // num_groups if num_groups else 0
    normed = block.prologue.moments is not None
    tiles = tiles_for(
        x, num_members, most, space, outputs, sources, taps_h * taps_w, per_group, tiling, normed=normed
    )  # fmt: skip
    # what chooses between two images takes registers too, beside the sums of 256 columns
    part = PART // 2 if normed and skip is not None and tiles.block_n > COLUMNS else PART
    with_moments = num_groups > 0 and has_whole_groups(tiles.block_n, per_group, part)
    row_tiles = cdiv(most, tiles.rows)
    place_tiles, output_tiles = cdiv(space, tiles.places), cdiv(outputs, tiles.block_n)
    programs = num_members * row_tiles * place_tiles * output_tiles
    steps = taps_h * taps_w * tiles.blocks(sources)
    aligned = skip is None or x.shape[1] % 32 == 0
    mask_words = -(-tiles.block_k // 32) + (not aligned)  # that the channels of a step are of
    first_row = None if offsets is None else offsets.to(x.device, non_blocking=True)
    wide_type = tl.float64 if wide == torch.float64 else tl.float32
    tf32 = x.dtype == torch.float32 and convolution_precision() == "tf32"
    bias, row_bias, mask = (None if t is None else t.contiguous() for t in (block.bias, epilogue.row_bias, mask))
    out_moments = found if with_moments else None
    with device_of(x).current():
        norm = Norm.prepare(block, tiles)
        workspace, arrivals = tiles.meeting(programs, y)
        conv2d_kernel[(programs, tiles.splits)](
            x, skip, mask, weight, bias, y, workspace, arrivals, *norm.tensors, row_bias, epilogue.residual,
            out_moments, first_row, per_member, channels, skip_channels, outputs, height, width, out_height, out_width,
            *block.stride, *block.padding, row_tiles, place_tiles, output_tiles, steps,
            cdiv(steps, tiles.splits), norm.per_group, norm.per_norm, SPAN, *weight.stride(),
            mask_scale=block.prologue.mask_scale, MASK_WORDS=mask_words,
            MASK_BY_MEMBER=mask is not None and len(mask) != rows,
            ACTIVATION=block.prologue.activation, output_scale=epilogue.output_scale,
            OUTPUT_ACTIVATION=epilogue.output_activation, SHARED=block.shared, SPLITS=tiles.splits,
            PRECISION="tf32" if tf32 else "ieee", WIDE=wide_type,
            WIDENED=x.dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
            TAPS_H=taps_h, TAPS_W=taps_w, ROWS=tiles.rows, PLACES=tiles.places, BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k, PER_GROUP=per_group or 1, PART=part, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, **norm.constants, **tiles.evenness(x, sources, y, weight, block.stride),
        )  # fmt: skip
    return y, group_moments(y, num_groups, found) if num_groups and not with_moments else found
