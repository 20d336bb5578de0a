"""Emitting convolutions, with what they compute of their input on its way in and of their result on its way out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from fastens.plan.cpu.packing import multiplies_bfloat16, packed_size
from fastens.plan.cpu.tiling import tile
from fastens.plan.cpu.winograd import squares_of
from fastens.plan.lowering.values import Convolved, Padded, mask_step
from fastens.plan.memory import At, or_none
from fastens.program import steps
from fastens.program.steps import Image

if TYPE_CHECKING:
    from fastens.plan.lowering.builder import Emitter


def convolution(emitter: Emitter, value: Convolved, at: At) -> None:
    """Append the convolution that computes a value into a place."""
    _, out_channels, in_channels, kernel_h, kernel_w = value.weight.shape
    pixels, padding = value.pixels, value.padding
    inner = emitter.values.get(value.inner.ref.storage)
    read = value.inner
    if isinstance(inner, Padded) and inner.pixels.same_place(read):
        # zeros that the network put around the image are the convolution's own padding
        padding = (padding[0] + inner.padding[2], padding[1] + inner.padding[0])
        read = inner.inner
    source = emitter.source(read)
    pair = emitter.pair(source)
    # products of bfloat16 where the user's network is in it, the machine multiplies it, and channels come in pairs
    pairs = pixels.ref.dtype == torch.bfloat16 and in_channels % 2 == 0 and multiplies_bfloat16()
    squares = 0 if pairs or emitter.typed else squares_of(value, emitter.num_threads, emitter.exact)
    tiling = tile(value, in_channels, emitter.num_threads, squares)
    weight = emitter.packed(value, tiling.vectors, pairs, squares)
    padded = -(-out_channels // steps.LANES) * steps.LANES
    bias = None
    if value.bias is not None:
        filled = torch.nn.functional.pad(value.bias, (0, padded - out_channels))
        bias = emitter.constants.add(("bias", value.key), filled, value.bias)
    vector = value.row_vector or (None, 0)
    residual = Image() if value.residual is None else emitter.image(value.residual)
    scale, shift = source.tables or (None, None)
    emitter.add(
        (functools.partial(steps.Winograd, tile=squares) if squares else steps.Conv)(
            pixels.rows,
            value.runs.rows,
            tiling.row_chunk,
            tiling.band,
            tiling.block_chunk,
            tiling.vectors,
            pair,
            source.factor,
            read.height,
            read.width,
            kernel_h,
            kernel_w,
            *value.stride,
            *padding,
            pixels.height,
            pixels.width,
            out_channels,
            or_none(scale),
            or_none(shift),
            int(source.activation),
            weight,
            packed_size((1, *value.weight.shape[1:]), pairs, squares),
            or_none(bias),
            padded,
            or_none(vector[0]),
            vector[1],
            residual,
            float(value.scale),
            int(value.activation),
            Image(at, pixels.row, pixels.y, pixels.x, out_channels, pixels.rows),
            int(pairs),
            or_none(value.runs.members),
            mask_step(source.mask),
            mask_step(value.mask),
            float(value.divisor),
            tasks=tiling.tasks,
        )
    )
