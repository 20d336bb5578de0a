"""Lowering of layers: convolutions, linear layers, normalisations, attention, and how images are put together."""

from __future__ import annotations

import dataclasses

import torch

from fastens.plan.emit import Emitter
from fastens.plan.lower import FLOATS, argument, image_pixels, lowers
from fastens.plan.memory import At
from fastens.plan.record import Node
from fastens.plan.values import (
    Convolved,
    Enlarged,
    Joined,
    Leaf,
    Normed,
    Padded,
    Stored,
    pixels_of,
)
from fastens.program import steps

# Convolutions and linear layers


@lowers("fastens.conv")
def conv(emitter: Emitter, node: Node) -> bool:
    """A member-batched convolution in two dimensions, or in one as an image of one line."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    stack = emitter.constant(weight)
    plain = stack is not None and stack.ndim in (4, 5) and groups == 1 and set(dilation) == {1}
    if not plain or stack is None or len(x.size) != stack.ndim - 1 or x.size[0] == 0:
        return False
    if stack.ndim == 4:
        stack, stride, padding = stack.unsqueeze(3), (1, *stride), (0, *padding)
    runs = emitter.runs(x.size[0], argument(node, 9, "offsets"))
    pixels = image_pixels(emitter, x, 1)
    out = pixels_of(node.outs[0], 1)
    if pixels is None or out is None or runs is None:
        return False
    values = None if bias is None else emitter.constant(bias)
    key = ("conv", weight, bias)
    plain = Convolved(out, pixels, stack, values, key, tuple(stride), tuple(padding), runs)
    emitter.values[out.ref.storage] = _by_phases(emitter, plain) if transposed else plain
    return True


def _by_phases(emitter: Emitter, value: Convolved) -> Stored | Convolved:
    """A transposed convolution as plain ones, each of the output pixels that the same kernel elements reach.

    Output pixel ``s j + f`` of stride s and padding p reads input pixel ``j + b - m`` by kernel element ``r + s m``,
    with ``r = (f + p) % s``, ``b = (f + p) // s`` and m from 0. With stride 1 there is one phase, which later steps
    may join as they do any convolution.

    Args:
        emitter: it gets the steps.
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
        key = (*value.key, "transposed", y, x)  # pyright: ignore[reportGeneralTypeIssues]
        return dataclasses.replace(
            value, pixels=image, weight=kernels, key=key, stride=(1, 1), padding=(pads[0], pads[1])
        )

    if value.stride == (1, 1):
        return phase(0, 0)
    place = At(emitter.buffer(pixels.ref.span))
    for y in range(min(value.stride[0], pixels.height)):
        for x in range(min(value.stride[1], pixels.width)):
            emitter.convolution(phase(y, x), place.plus(y * pixels.y + x * pixels.x))
    return Stored(place)


@lowers("fastens.linear")
def linear(emitter: Emitter, node: Node) -> bool:
    """A member-batched linear layer: a convolution of 1x1 over tokens."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    stack = emitter.constant(weight)
    extra = argument(node, 4, "activation", "none") != "none" or argument(node, 5, "members") is not None
    if stack is None or not x.numel or extra:
        return False
    runs = emitter.runs(x.size[0], argument(node, 3, "offsets"))
    pixels, out = image_pixels(emitter, x, -1), pixels_of(node.outs[0], -1)
    if pixels is None or out is None:
        return False
    moved = out.reshaped(pixels.height, pixels.width)
    values = None if bias is None else emitter.constant(bias)
    if moved is None or runs is None or (bias is not None and values is None):
        return False
    emitter.values[node.outs[0].storage] = Convolved(
        moved, pixels, stack[:, :, :, None, None], values, ("linear", weight, bias), (1, 1), (0, 0), runs
    )
    return True


# Normalisation


@lowers("fastens.group_norm")
def group_norm(emitter: Emitter, node: Node) -> bool:
    """Group normalisation, whose scale and shift a later step applies."""
    x, groups = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if not x.numel or _more_than_affine(node):
        return False
    pixels, out = image_pixels(emitter, x, 1), pixels_of(node.outs[0], 1)
    runs = emitter.runs(x.size[0], argument(node, 5, "offsets"))
    if pixels is None or out is None or runs is None:
        return False
    stacks = [None if ref is None else emitter.constant(ref) for ref in (weight, bias)]
    if any(ref is not None and stack is None for ref, stack in zip((weight, bias), stacks, strict=True)):
        return False
    places = [None if s is None else emitter.kept(s, ("norm", r)) for s, r in zip(stacks, (weight, bias), strict=True)]
    eps = float(argument(node, 4, "eps", 1e-5))
    emitter.values[node.outs[0].storage] = Normed(out, pixels, groups, eps, runs, *places)
    return True


def _more_than_affine(node: Node) -> bool:
    """Whether a normalisation has more of its own beside its parameters: scale, shift, activation, masks."""
    extra = (argument(node, i, name) for i, name in ((6, "scale"), (7, "shift"), (9, "members")))
    return any(value is not None for value in extra) or argument(node, 8, "activation", "none") != "none"


@lowers("fastens.layer_norm", "aten.native_layer_norm")
def layer_norm(emitter: Emitter, node: Node) -> bool:
    """Layer normalisation over the last dimension."""
    x, shape = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    whole = node.name == "fastens.layer_norm"
    if len(shape) != 1 or not x.numel or (whole and _more_than_affine(node)):
        return False
    if not whole and (weight is not None or bias is not None or any(emitter.uses[o.storage] for o in node.outs[1:])):
        return False
    pixels, out = image_pixels(emitter, x, -1), pixels_of(node.outs[0], -1)
    runs = emitter.runs(x.size[0], argument(node, 5, "offsets") if whole else None)
    if pixels is None or out is None or pixels.step is None or out.step is None or runs is None:
        return False
    stacks = [None if ref is None else emitter.constant(ref) for ref in (weight, bias)]
    if any(ref is not None and stack is None for ref, stack in zip((weight, bias), stacks, strict=True)):
        return False
    affine = [
        steps.NONE if s is None else emitter.kept(s, ("norm", r)) for s, r in zip(stacks, (weight, bias), strict=True)
    ]
    buffer = At(emitter.buffer(out.ref.numel))
    image = emitter.image(pixels)
    step = steps.LayerNorm(
        out.rows,
        runs.rows,
        out.height * out.width,
        out.channels,
        image.at,
        image.row,
        image.x if pixels.width > 1 else image.y,
        *affine,  # pyright: ignore[reportArgumentType]
        steps.NONE,
        0,
        steps.NONE,
        0,
        float(argument(node, 4, "eps", 1e-5)),
        buffer,  # pyright: ignore[reportArgumentType]
        out.row,
        out.step,
        steps.NONE if runs.members is None else runs.members,  # pyright: ignore[reportArgumentType]
        tasks=out.rows,
    )
    emitter.add(step)
    emitter.values[out.ref.storage] = Stored(buffer)
    return True


# Images


@lowers("aten.cat")
def cat(emitter: Emitter, node: Node) -> bool:
    """Two images joined along the channels; anything else part by part."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    out = node.outs[0]
    if out.dtype not in FLOATS or any(part.dtype != out.dtype for part in parts):
        return False
    parts = [part for part in parts if part.numel]
    dim %= len(out.size)
    pixels = pixels_of(out, dim) if dim > 0 else None
    inner = [pixels_of(part, dim) for part in parts] if dim > 0 else []
    inside = all(emitter.constant(part) is not None or emitter.is_wide(part) for part in parts)
    if pixels is not None and len(parts) == 2 and all(p is not None for p in inner) and inside:
        emitter.values[out.storage] = Joined(pixels, (inner[0], inner[1]))  # pyright: ignore[reportArgumentType]
        return True
    place = At(emitter.buffer(out.span))
    start = 0
    for part in parts:
        emitter.expression(Leaf(part), part.size, place.plus(start * out.stride[dim]), out.stride, 0)
        start += part.size[dim]
    emitter.values[out.storage] = Stored(place)
    return True


@lowers("aten.upsample_nearest2d")
def upsample(emitter: Emitter, node: Node) -> bool:
    """Nearest-neighbour enlargement by a whole number."""
    pixels, out = image_pixels(emitter, node.args[0], 1), pixels_of(node.outs[0], 1)
    if pixels is None or out is None or not out.ref.numel:
        return False
    factor = out.height // pixels.height
    if (out.height, out.width) != (pixels.height * factor, pixels.width * factor):
        return False
    emitter.values[out.ref.storage] = Enlarged(out, pixels, factor)
    return True


@lowers("aten.constant_pad_nd")
def pad(emitter: Emitter, node: Node) -> bool:
    """Zeros around an image."""
    padding = [*node.args[1], 0, 0, 0, 0][:4]
    pixels, out = image_pixels(emitter, node.args[0], 1), pixels_of(node.outs[0], 1)
    value = argument(node, 2, "value", 0)
    if pixels is None or out is None or value or len(node.args[1]) > 4 or min(padding) < 0 or not out.ref.numel:
        return False
    emitter.values[out.ref.storage] = Padded(out, pixels, tuple(padding))  # pyright: ignore[reportArgumentType]
    return True
