"""Triton kernel of the member-batched convolution whose loads are tensor descriptors, for the Hopper and later.

y[r] = act((conv(x[r], W_k) + b_k + row_bias[r] + residual[r]) * output_scale) for the rows r of member k. For each tap
of the kernel, a tile of x is one box of [R, H, W, C] (of [R, H/2, 2, W/2, 2 C] with a stride of two), which the memory
accelerator fills with zeros where it overhangs: that is the convolution's padding. Both operands of the products lie
in shared memory. What is before the convolution (a norm, an activation, a second image) is a pass of its own.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import dataclasses
import functools

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastens.device import convolution_precision, device_of
from fastens.kernels._conv2d import finish, has_whole_groups, joined
from fastens.kernels._conv2d_launch import meeting, splits_of
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.kernels.group_moments import group_moments
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN, counts


@kernel
def conv2d_tma_kernel(
    x, weight, bias, y, workspace, arrivals, row_bias, residual, moments, rows_per_member, channels, outputs,
    out_height, out_width, above, before, row_tiles, tiles_down, tiles_across, output_tiles, steps, steps_per_split,
    output_scale: tl.constexpr, OUTPUT_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDENED: tl.constexpr,
    STRIDE: tl.constexpr, SPLITS: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, ROWS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_GROUP: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """One tile of one member's result, or of one split of its sum.

    It has ROWS rows, TILE_H by TILE_W places of each, and BLOCK_N channels.
    """
    wait_for_previous()
    PLACES: tl.constexpr = TILE_H * TILE_W
    pid = tl.program_id(0)
    first_column = pid % output_tiles * BLOCK_N
    place_tile = pid // output_tiles % (tiles_down * tiles_across)
    row_tile = pid // output_tiles // (tiles_down * tiles_across) % row_tiles
    member = pid // output_tiles // (tiles_down * tiles_across) // row_tiles
    top, left = place_tile // tiles_across * TILE_H, place_tile % tiles_across * TILE_W
    first = member * rows_per_member + row_tile * ROWS
    # The sums are transposed: the compiler leaves the left operand in shared memory only where it is loaded as it is,
    # and the right one, here the box of x, where it is reshaped too.
    acc = tl.zeros([BLOCK_N, ROWS * PLACES], tl.float32)
    begin, end = 0, steps
    if SPLITS > 1:
        begin = tl.program_id(1) * steps_per_split
        end = tl.minimum(begin + steps_per_split, steps)
    tl.assume(begin < end)  # the products of a loop that may be empty are not in flight
    for step in range(begin, end):
        tap = step % (TAPS_H * TAPS_W)
        channel = step // (TAPS_H * TAPS_W) * BLOCK_K
        down, right = tap // TAPS_W - above, tap % TAPS_W - before
        if STRIDE == 1:
            a = x.load([first, top + down, left + right, channel])
        else:  # the second and last but one index are whether the place in x is odd
            odd_h, odd_w = down & 1, right & 1
            a = x.load([first, top + (down >> 1), odd_h, left + (right >> 1), odd_w * channels + channel])
        a = tl.reshape(a, [ROWS * PLACES, BLOCK_K])
        b = tl.reshape(weight.load([tap, member * outputs + first_column, channel]), [BLOCK_N, BLOCK_K])
        if WIDENED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(b, a.T, acc, input_precision=PRECISION)
    last = True
    if SPLITS > 1:
        acc, last = joined(acc, workspace, arrivals, SPLITS, BLOCK_N, ROWS * PLACES, tl.float32)
    each = tl.arange(0, ROWS * PLACES)
    at_h, at_w = top + each // TILE_W % TILE_H, left + each % TILE_W
    end_row = (member + 1) * rows_per_member
    row, at_row = first.to(tl.int64) + tl.arange(0, ROWS), first.to(tl.int64) + each // PLACES
    valid = (at_row < end_row) & (at_h < out_height) & (at_w < out_width)
    if last:
        finish(
            acc.T, y, bias, row_bias, residual, moments, member.to(tl.int64), row, row < end_row, at_row,
            at_h * out_width + at_w, valid, first_column, outputs, out_height * out_width, place_tile,
            tiles_down * tiles_across, output_scale, OUTPUT_ACTIVATION, tl.float32, ROWS, PLACES, BLOCK_N, PER_GROUP,
            PART,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile: its rows, places down and across, and whether those of each tile are one span of a row's places."""

    rows: int
    height: int
    width: int
    spans: bool


@functools.lru_cache(maxsize=4096)
def tile_for(size: int, rows: int, height: int, width: int) -> Tile:
    """The tile of so many places that overhangs a member's rows of images least; the widest of several."""
    best: tuple[int, int, int] | None = None
    for across in (1 << n for n in range(size.bit_length())):
        if across >= 2 * width:
            break
        down = min(size // across, next_power_of_2(height))
        together = size // (across * down)
        covered = (-(-rows // together) * together) * (-(-height // down) * down) * (-(-width // across) * across)
        best = min(best or (covered, -across, down), (covered, -across, down))
    assert best is not None
    across, down = -best[1], best[2]
    whole = height * width <= SPAN and across >= width and down >= height
    in_order = across == width or (down == 1 and width % across == 0)
    return Tile(size // (down * across), down, across, whole or (in_order and down * across == SPAN))


ALIGNMENT = 16  # bytes, of what a descriptor begins at
LARGEST_SPLIT = 1 << 14  # sums of a tile: of more, a part and the one that it is added to have no room in registers
# Rows of a product, its columns, warps, and stages. In 16 bits two blocks of all but the last, whose stages fill the
# shared memory, fit a multiprocessor where a tile is of one image (the ends of several take 212 registers): the end of
# one tile, which waits for memory, is beside the products of another.
TILINGS = {
    "tma 64x128": (64, 128, 4, 4),
    "tma 128x128": (128, 128, 8, 3),
    "tma 128x256": (128, 256, 8, 4),
}


def conv2d_tma(
    block: ConvBlock, tiling: str = "tma 128x128", into: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve what :func:`fastens.ops._tma_ways.refuses_tma` does not refuse.

    Args:
        block: with nothing before it; images and weights channels last in memory.
        tiling: of :data:`TILINGS`.
        into: where result and moments are written; its size says how many zeros are below and to the right.

    Returns:
        [R, O, H', W'] with its channels last in memory, and its moments [R, num_groups, T, 2].
    """
    # Choices are remembered by shape: what has one that was taken, and lies otherwise in memory, is copied.
    block = block.channels_last()
    x, weight, epilogue = _in_boxes(block.x), _in_boxes(block.weight), block.epilogue
    stride, padding, num_groups = block.stride, block.padding, epilogue.num_groups
    num_members, outputs, channels, taps_h, taps_w = weight.shape
    rows, _, height, width = x.shape
    y, found = into or (block.result(), None)
    out_height, out_width = y.shape[2:]
    if found is None:
        shape = (rows, num_groups, len(counts(out_height * out_width)), 2) if num_groups else 0
        found = x.new_empty(shape, dtype=torch.float32)
    if y.numel() == 0:
        return y, found
    bias, row_bias = (None if t is None else t.contiguous() for t in (block.bias, epilogue.row_bias))
    size, block_n, num_warps, num_stages = TILINGS[tiling]
    if x.element_size() == 4:
        num_warps = 8  # a warp of four would have more numbers of the epilogue than it has registers
    block_k = min(128 // x.element_size(), max(16, next_power_of_2(channels)))
    pixels = (height, width)
    at_h, at_w = out_height, out_width
    if taps_h * taps_w == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0) and y.shape[2:] == x.shape[2:]:
        pixels, at_h, at_w = (1, height * width), 1, height * width  # a product of matrices: places in one line
    tile = tile_for(size, rows // num_members, at_h, at_w)
    per_group = outputs // num_groups if num_groups else 1
    part = 16 * num_warps  # channels of which each warp holds as many, so that no number changes warps to halve a tile
    with_moments = num_groups > 0 and tile.spans and has_whole_groups(block_n, per_group, part)
    box = [tile.rows, tile.height, tile.width, block_k]
    if stride[0] == 1:
        lengths = [rows, *pixels, channels]
    else:
        lengths, box = [rows, height // 2, 2, width // 2, 2 * channels], [*box[:2], 1, *box[2:]]
    tf32 = x.dtype == torch.float32 and convolution_precision() == "tf32"
    row_tiles, output_tiles = cdiv(rows // num_members, tile.rows), cdiv(outputs, block_n)
    tiles_down, tiles_across = cdiv(at_h, tile.height), cdiv(at_w, tile.width)
    programs = num_members * row_tiles * tiles_down * tiles_across * output_tiles
    steps = taps_h * taps_w * cdiv(channels, block_k)
    splits = 1
    if size * block_n <= LARGEST_SPLIT:
        splits = splits_of(programs, steps, (size + block_n) * block_k * x.element_size(), size * block_n * 4, x.device)
    with device_of(x).current():
        workspace, arrivals = meeting(splits, programs, size * block_n, y)
        conv2d_tma_kernel[(programs, splits)](
            TensorDescriptor(x, lengths, _strides(lengths), box),
            TensorDescriptor(
                weight, [taps_h * taps_w, num_members * outputs, channels], [channels, taps_h * taps_w * channels, 1],
                [1, block_n, block_k],
            ),
            bias, y, workspace, arrivals, row_bias, epilogue.residual, found if with_moments else None,
            rows // num_members, channels, outputs, at_h, at_w, *padding, row_tiles, tiles_down, tiles_across,
            output_tiles, steps, cdiv(steps, splits),
            output_scale=epilogue.output_scale, OUTPUT_ACTIVATION=epilogue.output_activation,
            PRECISION="tf32" if tf32 else "ieee",
            WIDENED=x.dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
            STRIDE=stride[0], SPLITS=splits, TAPS_H=taps_h, TAPS_W=taps_w, ROWS=tile.rows, TILE_H=tile.height,
            TILE_W=tile.width, BLOCK_N=block_n, BLOCK_K=block_k, PER_GROUP=per_group, PART=part, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
    return y, group_moments(y, num_groups, found) if num_groups and not with_moments else found


def _strides(lengths: list[int]) -> list[int]:
    """The strides of dense memory of these lengths."""
    strides = [1]
    for length in reversed(lengths[1:]):
        strides.insert(0, strides[0] * length)
    return strides


def _in_boxes(t: Tensor) -> Tensor:
    """Return t with its channels last in memory, and at an address that descriptors can have."""
    last = t.movedim(-3, -1).contiguous()
    return (last.clone() if last.data_ptr() % ALIGNMENT else last).movedim(-1, -3)
