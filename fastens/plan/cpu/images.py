"""Steps that write an image: what convolutions and norms otherwise compute on their way in, and padding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from fastens.plan.lowering.values import Activated, Dropped, Enlarged, Joined, Normed, Padded, Pixels, Source, mask_step
from fastens.plan.memory import At, or_none
from fastens.program import steps
from fastens.program.steps import Activation, Image, Opcode, Strided

if TYPE_CHECKING:
    from fastens.plan.lowering.builder import Emitter

_ACTIVATIONS = {
    Activation.SILU: Opcode.SILU,
    Activation.GELU: Opcode.GELU,
    Activation.GELU_TANH: Opcode.GELU_TANH,
}


def copied(emitter: Emitter, value: Activated | Dropped | Normed | Joined | Enlarged, at: At) -> None:
    """Append the steps that write a value computed on the way, of each joined part apart."""
    pixels = value.pixels
    source = emitter.source(pixels)
    if source.mask is not None and source.factor == 1:
        _dropped(emitter, source, pixels, at)
        return
    if source.mask is not None:
        source = dataclasses.replace(emitter.plain(value.inner), factor=source.factor)
    factor, tables = source.factor, source.tables
    channel = 0
    for part in source.images:
        image = emitter.image(part)
        channels = image.channels
        height, width = pixels.height // factor, pixels.width // factor
        sizes = [pixels.rows, height, factor, width, factor, channels]
        inputs = [Strided(image.at, 0, [image.row, image.y, 0, image.x, 0, 1])]
        code: list[tuple[Opcode, int, int, float]] = []
        if tables is not None:
            for table in tables:
                inputs.append(Strided(table.plus(channel), 0, [pixels.channels, 0, 0, 0, 0, 1]))
            code += [(Opcode.MULTIPLY, 0, 1, 0.0), (Opcode.ADD, 3, 2, 0.0)]
        last = len(inputs) + len(code) - 1
        code.append((_ACTIVATIONS.get(source.activation, Opcode.COPY), last, 0, 0.0))
        out = Strided(
            at.plus(channel),
            0,
            [pixels.row, factor * pixels.y, pixels.y, factor * pixels.x, pixels.x, 1],
        )
        emitter.pointwise(sizes, out, inputs, code)
        channel += channels


def _dropped(emitter: Emitter, source: Source, pixels: Pixels, at: At) -> None:
    scale, shift = source.tables or (None, None)
    splits = max(1, min(pixels.height, 4 * emitter.num_threads // pixels.rows))
    out = Image(at, pixels.row, pixels.y, pixels.x, pixels.channels, pixels.rows)
    emitter.add(
        steps.Drop(
            pixels.rows,
            splits,
            emitter.pair(source),
            pixels.height,
            pixels.width,
            or_none(scale),
            or_none(shift),
            int(source.activation),
            mask_step(source.mask),
            out,
            tasks=pixels.rows * splits,
        )
    )


def padded(emitter: Emitter, value: Padded, at: At) -> None:
    """Append the steps that write an image with zeros around it."""
    pixels, inner = value.pixels, value.inner
    left, _, top, _ = value.padding
    zero = emitter.kept(torch.zeros(1), "zero")
    strides = [0, 0, pixels.row, pixels.y, pixels.x, 1]
    full = [1, 1, pixels.rows, pixels.height, pixels.width, pixels.channels]
    copy = [(Opcode.COPY, 0, 0, 0.0)]
    emitter.pointwise(full, Strided(at, 0, strides), [Strided(zero, 0, [0] * 6)], copy)
    image = emitter.image(inner)
    inside = [1, 1, inner.rows, inner.height, inner.width, inner.channels]
    start = at.plus(top * pixels.y + left * pixels.x)
    source = Strided(image.at, 0, [0, 0, image.row, image.y, image.x, 1])
    emitter.pointwise(inside, Strided(start, 0, strides), [source], copy)
