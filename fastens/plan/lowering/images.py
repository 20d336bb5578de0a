"""Nodes that write an image: what convolutions and norms otherwise compute on their way in, and padding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from fastens.plan.graph import Code, Materialize, View
from fastens.plan.lowering.values import Activated, Dropped, Enlarged, Joined, Normed, Padded
from fastens.plan.memory import Constant, Memory
from fastens.program.steps import Opcode

if TYPE_CHECKING:
    from fastens.plan.lowering.builder import Builder


def materialized(builder: Builder, value: Activated | Dropped | Normed | Joined | Enlarged, where: Memory) -> None:
    """Append the node that writes a value which is computed on the way."""
    pixels = value.pixels
    chain = builder.chain(pixels)
    if chain.mask is not None and chain.factor != 1:  # masks are of pixels as they are stored
        assert not isinstance(value, Joined)
        chain = dataclasses.replace(builder.plain(value.inner), factor=chain.factor)
    out = View(
        where, 0, (pixels.rows, pixels.channels, pixels.height, pixels.width), (pixels.row, 1, pixels.y, pixels.x)
    )
    builder.add(Materialize(out, builder.source(chain)))


def padded(builder: Builder, value: Padded, where: Memory) -> None:
    """Append the nodes that write an image with zeros around it."""
    pixels, inner = value.pixels, value.inner
    left, _, top, _ = value.padding
    zero = Constant("zero", torch.zeros(1, device=builder.device), None)
    stride = (pixels.row, pixels.y, pixels.x, 1)
    size = (pixels.rows, pixels.height, pixels.width, pixels.channels)
    copy: Code = [(Opcode.COPY, 0, 0, 0.0)]
    builder.pointwise(View(where, 0, size, stride), [View(zero, 0, size, (0, 0, 0, 0))], copy)
    image = builder.image(inner)
    inside = (inner.rows, inner.height, inner.width, inner.channels)
    row, _, y, x = image.stride
    start = top * pixels.y + left * pixels.x
    builder.pointwise(
        View(where, start, inside, stride), [View(image.where, image.offset, inside, (row, y, x, 1))], copy
    )
