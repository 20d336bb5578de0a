"""Transposed convolutions as plain ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from fastens.plan.lowering.values import Convolved, Padded, Stored

if TYPE_CHECKING:
    from fastens.plan.lowering.builder import Builder


def by_phases(builder: Builder, value: Convolved) -> Stored | Convolved:
    """A transposed convolution as plain ones, each of the output pixels that the same kernel elements reach.

    Output pixel ``s j + f`` of stride s and padding p reads input pixel ``j + b - m`` by kernel element ``r + s m``,
    with ``r = (f + p) % s``, ``b = (f + p) // s`` and m from 0. With stride 1 there is one phase, which later nodes
    may join as they do any convolution.

    Args:
        builder: it gets the nodes.
        value: stack [K, C_in, C_out, kernel_h, kernel_w], stride and padding of the transposed convolution.
    """
    stack, pixels = value.weight.transpose(1, 2), value.pixels

    def phase(y: int, x: int) -> Convolved:
        kernels, pads = stack, []
        for dim, first, stride, padding in zip((3, 4), (y, x), value.stride, value.padding, strict=True):
            rest, base = (first + padding) % stride, (first + padding) // stride
            taps = torch.tensor([*range(rest, stack.shape[dim], stride)][::-1], dtype=torch.int64)
            kernels = kernels.index_select(dim, taps) if len(taps) else torch.zeros_like(kernels.narrow(dim, 0, 1))
            pads.append(max(1, len(taps)) - 1 - base)
        image = dataclasses.replace(
            pixels,
            height=-(-(pixels.height - y) // value.stride[0]),
            width=-(-(pixels.width - x) // value.stride[1]),
            y=pixels.y * value.stride[0],
            x=pixels.x * value.stride[1],
        )
        key = (*value.key, "transposed", y, x)  # pyright: ignore[reportGeneralTypeIssues]  # a tuple
        return dataclasses.replace(
            value, pixels=image, weight=kernels, key=key, stride=(1, 1), padding=(pads[0], pads[1])
        )

    if value.stride == (1, 1):
        return phase(0, 0)
    if (
        not isinstance(builder.values.get(value.inner.ref.storage), Padded)
        and builder.constant(value.inner.ref) is None
    ):
        builder.stored(value.inner.ref)  # every phase reads it: norm and activation are computed once
    buffer = builder.buffer(pixels.ref.span, pixels.ref.dtype)
    for y in range(min(value.stride[0], pixels.height)):
        for x in range(min(value.stride[1], pixels.width)):
            builder.convolution(phase(y, x), buffer, y * pixels.y + x * pixels.x)
    return Stored(buffer)
