"""Lowering of layers: convolutions, linear layers, normalisations, attention, and how images are put together."""

from __future__ import annotations

from typing import Any

import torch

from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.registry import argument, image_pixels, lowers
from fastens.plan.lowering.transposed import by_phases
from fastens.plan.lowering.values import (
    Convolved,
    Enlarged,
    Joined,
    Leaf,
    Normed,
    Padded,
    Runs,
    Stored,
    pixels_of,
)
from fastens.plan.memory import At, or_none
from fastens.program import steps
from fastens.program.steps import Opcode
from fastens.trace.record import Node, Ref

# Convolutions and linear layers


@lowers("fastens.conv")
def conv(emitter: Emitter, node: Node) -> bool:
    """A member-batched convolution in two dimensions, or in one as an image of one line."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    stack = emitter.constant(weight)
    values = None if bias is None else emitter.constant(bias)
    if stack is None or not x.numel or groups != 1 or set(dilation) != {1} or (bias is not None and values is None):
        return False
    runs = emitter.runs(x.size[0], argument(node, 9, "offsets"), len(stack))
    return _convolved(emitter, node, stack, values, ("conv", weight, bias), stride, padding, runs, transposed)


@lowers("aten.convolution")
def shared_conv(emitter: Emitter, node: Node) -> bool:
    """A convolution by one set of weights for all rows."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    kernel = emitter.constant(weight)
    values = None if bias is None else emitter.constant(bias)
    if kernel is None or not x.numel or transposed or groups != 1 or set(dilation) != {1}:
        return False
    if kernel.dtype != torch.float32 or (bias is not None and values is None):
        return False
    values = None if values is None else values[None]
    # one number may stand for all dimensions
    stride, padding = (list(n) * (kernel.ndim - 2) if len(n) == 1 else n for n in (stride, padding))
    key = ("shared", weight, bias)
    return _convolved(emitter, node, kernel[None], values, key, stride, padding, Runs(x.size[0]))


def _convolved(
    emitter: Emitter,
    node: Node,
    stack: Any,
    bias: Any,
    key: tuple[Any, ...],
    stride: Any,
    padding: Any,
    runs: Runs | None,
    transposed: bool = False,
) -> bool:
    x = node.args[0]
    if stack.ndim not in (4, 5) or len(x.size) != stack.ndim - 1:
        return False
    if stack.ndim == 4:
        stack, stride, padding = stack.unsqueeze(3), (1, *stride), (0, *padding)
    pixels = image_pixels(emitter, x, 1)
    out = pixels_of(node.outs[0], 1)
    if pixels is None or out is None or runs is None:
        return False
    value = Convolved(out, pixels, stack, bias, key, tuple(stride), tuple(padding), runs)
    emitter.values[out.ref.storage] = by_phases(emitter, value) if transposed else value
    return True


@lowers("aten.mm", "aten.addmm")
def shared_linear(emitter: Emitter, node: Node) -> bool:
    """A linear layer by one set of weights for all rows."""
    *bias, x, matrix = node.args
    weight = emitter.constant(matrix)
    values = emitter.constant(bias[0]) if bias else None
    if weight is None or not x.numel or node.kwargs or (bias and (values is None or values.ndim != 1)):
        return False
    pixels, out = image_pixels(emitter, x, -1), pixels_of(node.outs[0], -1)
    if pixels is None or out is None or weight.dtype != torch.float32:
        return False
    stack, values = weight.t()[None, :, :, None, None], None if values is None else values[None]
    emitter.values[node.outs[0].storage] = Convolved(
        out, pixels, stack, values, ("shared", matrix, *bias), (1, 1), (0, 0), Runs(x.size[0])
    )
    return True


@lowers("fastens.linear")
def linear(emitter: Emitter, node: Node) -> bool:
    """A member-batched linear layer: a convolution of 1x1 over tokens."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    stack = emitter.constant(weight)
    extra = argument(node, 4, "activation", "none") != "none" or argument(node, 5, "members") is not None
    if stack is None or not x.numel or extra:
        return False
    runs = emitter.runs(x.size[0], argument(node, 3, "offsets"), len(stack))
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
    if not x.numel or _more_than_affine(node):
        return False
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    runs = emitter.runs(x.size[0], argument(node, 5, "offsets"), _members(weight, bias))
    return _normed(emitter, node, groups, weight, bias, float(argument(node, 4, "eps", 1e-5)), runs)


@lowers("aten.native_group_norm")
def shared_group_norm(emitter: Emitter, node: Node) -> bool:
    """Group normalisation with one scale and shift for all rows; or only its moments, where they are what is used."""
    x, weight, bias, _, _, _, groups, eps = node.args
    if not x.numel:
        return False
    if any(emitter.uses[out.storage] for out in node.outs[1:]):
        return _moments(emitter, node)
    return _normed(emitter, node, groups, weight, bias, float(eps), Runs(x.size[0]))


def _normed(emitter: Emitter, node: Node, groups: int, weight: Any, bias: Any, eps: float, runs: Runs | None) -> bool:
    pixels, out = image_pixels(emitter, node.args[0], 1), pixels_of(node.outs[0], 1)
    if pixels is None or out is None or runs is None:
        return False
    stacks = [None if ref is None else emitter.constant(ref) for ref in (weight, bias)]
    if any(ref is not None and stack is None for ref, stack in zip((weight, bias), stacks, strict=True)):
        return False
    scale, shift = (
        None if s is None else emitter.kept(s, ("norm", r)) for s, r in zip(stacks, (weight, bias), strict=True)
    )
    emitter.values[node.outs[0].storage] = Normed(out, pixels, groups, eps, runs, scale, shift)
    return True


def _moments(emitter: Emitter, node: Node) -> bool:
    """Mean and reciprocal deviation of each group, as derivatives take them, where the normalised values have no use.

    torch's own, of images with their channels last, lose digits where the mean is large beside the deviation.
    """
    x, weight, bias, _, channels, _, groups, eps = node.args
    normed, mean, rate = node.outs
    if weight is not None or bias is not None or emitter.uses[normed.storage] or x.dtype not in emitter.floats:
        return False
    pixels, runs = image_pixels(emitter, x, 1), emitter.runs(x.size[0], None, 1)
    if pixels is None or runs is None:
        return False
    scale, shift = emitter.tables(Normed(pixels, pixels, groups, float(eps), runs, None, None))
    step = [0, 0, 0, 0, channels, channels // groups]
    inputs = [steps.Strided(at, 0, step) for at in (shift, scale)]
    code = {
        rate.storage: [(Opcode.COPY, 1, 0, 0.0)],
        mean.storage: [(Opcode.DIVIDE, 0, 1, 0.0), (Opcode.MULTIPLY_NUMBER, 2, 0, -1.0)],
    }
    for storage, instructions in code.items():
        place = At(emitter.buffer(x.size[0] * groups))
        out = steps.Strided(place, 0, [0, 0, 0, 0, groups, 1])
        emitter.pointwise([1, 1, 1, 1, x.size[0], groups], out, inputs, instructions)
        emitter.values[storage] = Stored(place)
    return True


def _members(*parameters: Ref | None) -> int:
    """How many members have parameters of their own: those of a norm, which may have none."""
    return next((ref.size[0] for ref in parameters if ref is not None), 1)


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
    runs = emitter.runs(x.size[0], argument(node, 5, "offsets") if whole else None, _members(weight, bias))
    if pixels is None or out is None or pixels.step is None or out.step is None or runs is None:
        return False
    stacks = [None if ref is None else emitter.constant(ref) for ref in (weight, bias)]
    if any(ref is not None and stack is None for ref, stack in zip((weight, bias), stacks, strict=True)):
        return False
    affine = [
        steps.NONE if s is None else emitter.kept(s, ("norm", r)) for s, r in zip(stacks, (weight, bias), strict=True)
    ]
    buffer = At(emitter.buffer(out.ref.numel, out.ref.dtype))
    image = emitter.image(pixels)
    step = steps.LayerNorm(
        out.rows,
        runs.rows,
        out.height * out.width,
        out.channels,
        image.at,
        image.row,
        image.x if pixels.width > 1 else image.y,
        affine[0],
        affine[1],
        steps.NONE,
        0,
        steps.NONE,
        0,
        float(argument(node, 4, "eps", 1e-5)),
        buffer,
        out.row,
        out.step,
        or_none(runs.members),
        tasks=out.rows,
    )
    emitter.add(step)
    emitter.values[out.ref.storage] = Stored(buffer)
    return True


@lowers("aten.index_select")
def gather(emitter: Emitter, node: Node) -> bool:
    """What is the member's of each row, where rows are dealt out when the program runs."""
    table, dim, index = node.args[:3]
    out, values = node.outs[0], emitter.constant(table)
    dealt = emitter.row_members is not None and emitter.recording.row_members == index
    if not dealt or dim != 0 or table.dtype != torch.float32 or not out.numel:
        return False
    if values is None and not (emitter.is_wide(table) and _in_line(table)):
        return False
    # the recorded result is contiguous, and so are its lines
    place, count = At(emitter.buffer(out.numel)), out.numel // out.size[0]
    lines = emitter.stored(table) if values is None else emitter.kept(values, ("gathered", table))
    emitter.add(steps.Gather(out.size[0], count, lines, emitter.stored(index), place))
    emitter.values[out.storage] = Stored(place)
    return True


def _in_line(ref: Ref) -> bool:
    step = 1
    for n, stride in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if n > 1 and stride != step:
            return False
        step *= n
    return True


# Images


@lowers("aten.cat")
def cat(emitter: Emitter, node: Node) -> bool:
    """Two images joined along the channels; anything else part by part."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    out = node.outs[0]
    if out.dtype not in emitter.floats or any(part.dtype != out.dtype for part in parts):
        return False
    parts = [part for part in parts if part.numel]
    dim %= len(out.size)
    pixels = pixels_of(out, dim) if dim > 0 else None
    inner = [pixels_of(part, dim) for part in parts] if dim > 0 else []
    inside = all(emitter.constant(part) is not None or emitter.is_wide(part) for part in parts)
    if pixels is not None and len(parts) == 2 and all(p is not None for p in inner) and inside:
        emitter.values[out.storage] = Joined(pixels, (inner[0], inner[1]))
        return True
    place = At(emitter.buffer(out.span, out.dtype))
    start = 0
    for part in parts:
        emitter.expression(Leaf(part), part.size, place.plus(start * out.stride[dim]), out.stride, 0)
        start += part.size[dim]
    emitter.values[out.storage] = Stored(place)
    return True


@lowers("aten.stack")
def stack(emitter: Emitter, node: Node) -> bool:
    """Tensors along a new dimension, one by one."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    out = node.outs[0]
    dim %= len(out.size)
    if (
        out.dtype not in emitter.floats
        or any(part.dtype != out.dtype for part in parts)
        or len(out.size) > steps.MAX_DIMS
    ):
        return False
    place = At(emitter.buffer(out.span, out.dtype))
    stride = (*out.stride[:dim], *out.stride[dim + 1 :])
    for i, part in enumerate(parts):
        emitter.expression(Leaf(part), part.size, place.plus(i * out.stride[dim]), stride, 0)
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
    emitter.values[out.ref.storage] = Padded(out, pixels, tuple(padding))
    return True
