"""Gluon kernel of a member-batched 3x3 convolution that loads an image once for three taps, for Hopper.

y[r] = act((conv(x[r], W_k) + b_k + row_bias[r] + residual[r]) * output_scale) for the rows r of member k. A tile is
TILE_H whole lines of one image, 256 places, by 128 output channels. Its input with a line more above and below, moved
by one of three columns, is loaded once into shared memory: the three taps of that column are the same lines, begun at
the first, second and third. A product of 256 places and 128 channels thus loads 28 to 30 KB, where a tile of
:mod:`fastens.kernels._conv2d_tma` of as many sums loads 48. What is before the convolution is a pass of its own.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
# Gluon compiles these functions: pyright takes them for Python, and a constexpr for no number, layout or function.

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastens.device import device_of
from fastens.kernels._conv2d import has_whole_groups
from fastens.kernels._conv2d_tma import _in_boxes, _strides
from fastens.kernels._launch import Kernel
from fastens.kernels._tiles import cdiv
from fastens.kernels.group_moments import group_moments
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN, counts

PLACES, BLOCK_N, BLOCK_K = 256, 128, 64  # of a tile: places and output channels; channels of a step
STAGES = 5  # taps whose weights are in shared memory
NUM_WARPS = 8
SHARED = 227 * 1024


@gluon.jit
def wait_for_previous():
    """As :func:`fastens.kernels._launch.wait_for_previous`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def activated(y, ACTIVATION: gl.constexpr):
    """``none`` or ``silu`` of y."""
    if ACTIVATION == "silu":
        y = y / (1.0 + gl.exp(-y))
    return y


@gluon.jit
def load_lines(
    step, exists, lines, edge, image, bars, row, top,
    TILE_H: gl.constexpr, TILE_W: gl.constexpr, BLOCK_K: gl.constexpr, HALOS: gl.constexpr,
):  # fmt: skip
    """Begin to load the lines of a step, a block of channels moved by a column, where there is such a step."""
    slot = step % HALOS
    bar = bars.index(slot)
    mbarrier.expect(bar, (TILE_H + 2) * TILE_W * BLOCK_K * 2, pred=exists)
    left, channel = step % 3 - 1, step // 3 * BLOCK_K
    first = slot * (TILE_H + 2)
    body = image.index(first)._reinterpret(gl.bfloat16, [1, TILE_H, TILE_W, BLOCK_K], lines.layout)
    last = image.index(first + TILE_H)._reinterpret(gl.bfloat16, [1, 2, TILE_W, BLOCK_K], edge.layout)
    tma.async_copy_global_to_shared(lines, [row, top - 1, left, channel], bar, body, pred=exists)
    tma.async_copy_global_to_shared(edge, [row, top - 1 + TILE_H, left, channel], bar, last, pred=exists)


@gluon.jit
def load_weights(
    product, exists, weight, taps, bars, column, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):
    """Begin to load the weights of a product, where there is such a product."""
    bar, into = bars.index(product % STAGES), taps.index(product % STAGES)
    step = product // 3
    mbarrier.expect(bar, BLOCK_N * BLOCK_K * 2, pred=exists)
    into = into._reinterpret(gl.bfloat16, [1, BLOCK_N, BLOCK_K], weight.layout)
    tap = product % 3 * 3 + step % 3
    tma.async_copy_global_to_shared(weight, [tap, column, step // 3 * BLOCK_K], bar, into, pred=exists)


@gluon.jit
def finish(
    acc, y, bias, row_bias, residual, moments, member, row, place, column, outputs, space, span,
    output_scale: gl.constexpr, ACTIVATION: gl.constexpr, PLACES: gl.constexpr, BLOCK_N: gl.constexpr,
    PER_GROUP: gl.constexpr,
):  # fmt: skip
    """Finish the sums acc [BLOCK_N, PLACES] of a span of a row's places: as :func:`fastens.kernels._conv2d.finish`."""
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, 8], [0, 1])
    of_channel: gl.constexpr = gl.SliceLayout(1, layout)
    acc = gl.convert_layout(acc, layout)
    channel = column + gl.arange(0, BLOCK_N, layout=of_channel)
    if bias is not None:
        acc += gl.load(bias + member * outputs + channel).to(gl.float32)[:, None]
    if row_bias is not None:
        acc += gl.load(row_bias + row * outputs + channel).to(gl.float32)[:, None]
    each = place + gl.arange(0, PLACES, layout=gl.SliceLayout(0, layout))
    at = (row * space + each)[None, :] * outputs + channel[:, None]
    if residual is not None:
        acc += gl.load(residual + at).to(gl.float32)
    stored = activated(acc * output_scale, ACTIVATION).to(y.dtype.element_ty)
    gl.store(y + at, stored)
    if moments is not None:
        GROUPS: gl.constexpr = BLOCK_N // PER_GROUP
        value = stored.to(gl.float32)
        mean = gl.sum(gl.reshape(gl.sum(value, 1), [GROUPS, PER_GROUP]), 1) / (PER_GROUP * PLACES)
        one = gl.zeros([BLOCK_N], gl.float32, of_channel)
        of_group: gl.constexpr = gl.reshape(one, [GROUPS, PER_GROUP]).type.layout
        mean = gl.convert_layout(mean, gl.SliceLayout(1, of_group))
        spread = gl.reshape(gl.zeros([GROUPS, PER_GROUP], gl.float32, of_group) + mean[:, None], [BLOCK_N])
        apart = value - gl.convert_layout(spread, of_channel)[:, None]
        scatter = gl.sum(gl.reshape(gl.sum(apart * apart, 1), [GROUPS, PER_GROUP]), 1)
        scatter = gl.convert_layout(scatter, gl.SliceLayout(1, of_group))
        group = column // PER_GROUP + gl.arange(0, GROUPS, layout=gl.SliceLayout(1, of_group))
        to = ((row * (outputs // PER_GROUP) + group) * (space // PLACES) + span) * 2
        gl.store(moments + to, mean)
        gl.store(moments + to + 1, scatter)


@gluon.jit
def conv2d_halo_kernel(
    lines, edge, weight, bias, y, row_bias, residual, moments, rows_per_member, outputs, space, tiles_down,
    output_tiles, steps,
    output_scale: gl.constexpr, OUTPUT_ACTIVATION: gl.constexpr, TILE_H: gl.constexpr, TILE_W: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, HALOS: gl.constexpr, PER_GROUP: gl.constexpr,
):  # fmt: skip
    """One tile of one member's result: its sums are over blocks of channels, columns, and lines, innermost the last."""
    wait_for_previous()
    PLACES: gl.constexpr = TILE_H * TILE_W
    pid = gl.program_id(0)
    column = pid % output_tiles * BLOCK_N
    tile = pid // output_tiles % tiles_down
    row = pid // output_tiles // tiles_down
    member = row // rows_per_member
    top = tile * TILE_H
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    image = gl.allocate_shared_memory(gl.bfloat16, [HALOS * (TILE_H + 2), TILE_W, BLOCK_K], swizzled)
    taps = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], swizzled)
    of_image = gl.allocate_shared_memory(gl.int64, [HALOS, 1], mbarrier.MBarrierLayout())
    of_taps = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HALOS):
        mbarrier.init(of_image.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(of_taps.index(i), count=1)
    first_weight = member * outputs + column
    for i in gl.static_range(HALOS - 1):
        load_lines(i, i < steps, lines, edge, image, of_image, row, top, TILE_H, TILE_W, BLOCK_K, HALOS)
    for i in gl.static_range(STAGES - 1):
        load_weights(i, i < 3 * steps, weight, taps, of_taps, first_weight, BLOCK_N, BLOCK_K, STAGES)
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 256, 16])
    acc = gl.zeros([BLOCK_N, PLACES], gl.float32, sums)
    gl.assume(steps > 0)  # the products of a loop that may be empty are not in flight
    for step in range(steps):
        slot = step % HALOS
        mbarrier.wait(of_image.index(slot), step // HALOS & 1)
        for down in gl.static_range(3):
            product = 3 * step + down
            mbarrier.wait(of_taps.index(product % STAGES), product // STAGES & 1)
            begun = image.index(slot * (TILE_H + 2) + down)._reinterpret(gl.bfloat16, [PLACES, BLOCK_K], swizzled)
            acc = warpgroup_mma(taps.index(product % STAGES), begun.permute((1, 0)), acc, is_async=True)
            # behind the end of the product before, its weights and a step's last lines are overwritten
            acc = warpgroup_mma_wait(1, deps=[acc])
            ahead = product + STAGES - 1
            load_weights(ahead, ahead < 3 * steps, weight, taps, of_taps, first_weight, BLOCK_N, BLOCK_K, STAGES)
            if down == 0:
                next_step = step + HALOS - 1
                load_lines(
                    next_step, next_step < steps, lines, edge, image, of_image, row, top, TILE_H, TILE_W, BLOCK_K, HALOS
                )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    for i in gl.static_range(HALOS):
        mbarrier.invalidate(of_image.index(i))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(of_taps.index(i))
    halves = gl.split(gl.permute(gl.reshape(acc, [BLOCK_N, 2, PLACES // 2]), [0, 2, 1]))
    for i in gl.static_range(2):
        finish(
            halves[i], y, bias, row_bias, residual, moments, member, row.to(gl.int64), (2 * tile + i) * (PLACES // 2),
            column, outputs, space, 2 * tile + i, output_scale, OUTPUT_ACTIVATION, PLACES // 2, BLOCK_N, PER_GROUP,
        )  # fmt: skip


class HaloKernel(Kernel):
    """A Gluon kernel that begins with :func:`wait_for_previous`, launched accordingly."""

    def __init__(self, compiled):
        self._compiled = compiled


KERNEL = HaloKernel(conv2d_halo_kernel)


def halos_for(width: int) -> int:
    """How many steps' lines are in shared memory, for images so wide: as many as there is room for, three at most."""
    step = (PLACES // width + 2) * width * BLOCK_K * 2
    return min(3, (SHARED - 1024 - STAGES * BLOCK_N * BLOCK_K * 2) // step)


def conv2d_halo(block: ConvBlock, into: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
    """Convolve what :func:`fastens.ops._tma_ways.refuses_halo` does not refuse; the result is as ``conv2d_tma``'s."""
    block = block.channels_last()
    x, weight, epilogue = _in_boxes(block.x), _in_boxes(block.weight), block.epilogue
    num_members, outputs, channels, _, _ = weight.shape
    rows, _, height, width = x.shape
    y, found = into or (block.result(), None)
    space, num_groups = height * width, epilogue.num_groups
    if found is None:
        shape = (rows, num_groups, len(counts(space)), 2) if num_groups else 0
        found = x.new_empty(shape, dtype=torch.float32)
    if y.numel() == 0:
        return y, found
    bias, row_bias = (None if t is None else t.contiguous() for t in (block.bias, epilogue.row_bias))
    per_group = outputs // num_groups if num_groups else 1
    with_moments = num_groups > 0 and has_whole_groups(BLOCK_N, per_group, BLOCK_N)
    tile_h, output_tiles = PLACES // width, outputs // BLOCK_N
    tiles_down = height // tile_h
    lengths, of_weight = [rows, height, width, channels], [9, num_members * outputs, channels]

    def descriptor(tensor, lengths, strides, box):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
        return TensorDescriptor(tensor, lengths, strides, box, layout)

    with device_of(x).current():
        KERNEL[(rows * tiles_down * output_tiles,)](
            descriptor(x, lengths, _strides(lengths), [1, tile_h, width, BLOCK_K]),
            descriptor(x, lengths, _strides(lengths), [1, 2, width, BLOCK_K]),
            descriptor(weight, of_weight, [channels, 9 * channels, 1], [1, BLOCK_N, BLOCK_K]),
            bias, y, row_bias, epilogue.residual, found if with_moments else None, rows // num_members, outputs, space,
            tiles_down, output_tiles, 3 * cdiv(channels, BLOCK_K),
            output_scale=epilogue.output_scale, OUTPUT_ACTIVATION=epilogue.output_activation, TILE_H=tile_h,
            TILE_W=width, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STAGES=STAGES, HALOS=halos_for(width), PER_GROUP=per_group,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    assert SPAN == PLACES // 2
    return y, group_moments(y, num_groups, found) if num_groups and not with_moments else found
