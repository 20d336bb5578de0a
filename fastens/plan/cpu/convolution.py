"""Emitting convolutions: how their weights are packed, and into which tasks they are cut."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from fastens.plan.cpu.packing import multiplies_bfloat16, packed, packed_size
from fastens.plan.cpu.tiling import Shape, tile
from fastens.plan.cpu.winograd import squares_of
from fastens.plan.graph import Conv
from fastens.program import steps
from fastens.program.steps import NONE, Activation, Image

if TYPE_CHECKING:
    from fastens.plan.cpu.emit import Emitter


def convolution(emitter: Emitter, node: Conv) -> steps.Conv:
    """The step of a convolution."""
    _, out_channels, in_channels, kernel_h, kernel_w = node.weight.tensor.shape
    out, source, behind = node.out, node.source, node.epilogue
    shape = shape_of(node)
    # products of bfloat16 where the user's network is in it, the machine multiplies it, and channels come in pairs
    pairs = out.dtype == torch.bfloat16 and in_channels % 2 == 0 and multiplies_bfloat16()
    squares = 0 if pairs else squares_of(shape, emitter.num_threads, emitter.exact)
    tiling = tile(shape, emitter.num_threads, squares)
    padded = -(-out_channels // steps.LANES) * steps.LANES
    bias = NONE
    if node.bias is not None:
        filled = torch.nn.functional.pad(node.bias.tensor, (0, padded - out_channels))
        bias = emitter.constants.add(node.bias.key, filled, node.bias.source)
    residual = Image() if behind.residual is None else emitter.image(behind.residual)
    return (functools.partial(steps.Winograd, tile=squares) if squares else steps.Conv)(
        shape.rows,
        node.runs.rows,
        tiling.row_chunk,
        tiling.band,
        tiling.block_chunk,
        tiling.vectors,
        emitter.pair(source.images),
        source.up,
        *source.space,
        kernel_h,
        kernel_w,
        *node.stride,
        *node.padding,
        shape.height,
        shape.width,
        out_channels,
        emitter.at_or_none(source.scale),
        emitter.at_or_none(source.shift),
        _number(source.activation),
        packed(emitter.constants, node.weight, tiling.vectors, pairs, squares),
        packed_size((1, *node.weight.tensor.shape[1:]), pairs, squares),
        bias,
        padded,
        emitter.at_or_none(behind.row_bias),
        0 if behind.row_bias is None else behind.row_bias.stride[0],
        residual,
        behind.output_scale,
        _number(behind.output_activation),
        emitter.image(out),
        int(pairs),
        emitter.bits(node.runs.members),
        emitter.mask(source.mask),
        emitter.mask(node.dropped),
        node.divisor,
        tasks=tiling.tasks,
    )


def shape_of(node: Conv) -> Shape:
    """What the choices for a convolution rest on."""
    members, out_channels, channels, *kernel = node.weight.tensor.shape
    rows, _, height, width = node.out.size
    own, given = node.runs.rows, node.runs.members is not None
    return Shape(rows, height, width, channels, out_channels, (kernel[0], kernel[1]), node.stride, members, own, given)


def _number(activation: str) -> int:
    return int(Activation[activation.upper()])
