"""Lowering of layers: convolutions, linear layers, normalisations, attention, and how images are put together."""

from __future__ import annotations

from typing import Any

import torch

from fastens.plan.graph import Code, Gather, LayerNorm, Runs, View
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.registry import argument, image_pixels, lowers
from fastens.plan.lowering.transposed import by_phases
from fastens.plan.lowering.values import (
    Convolved,
    Enlarged,
    Joined,
    Leaf,
    Normed,
    Padded,
    Stored,
    pixels_of,
)
from fastens.plan.memory import Constant
from fastens.program import steps
from fastens.program.steps import Opcode
from fastens.trace.record import Operation, Ref

# Convolutions and linear layers


@lowers("fastens.conv")
def conv(builder: Builder, op: Operation) -> bool:
    """A member-batched convolution in two dimensions, or in one as an image of one line."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args[:9]
    stack = builder.constant(weight)
    values = None if bias is None else builder.constant(bias)
    if stack is None or not x.numel or groups != 1 or set(dilation) != {1} or (bias is not None and values is None):
        return False
    runs = builder.runs(x.size[0], argument(op, 9, "offsets"), len(stack))
    return _convolved(builder, op, stack, values, ("conv", weight, bias), stride, padding, runs, transposed)


@lowers("aten.convolution")
def shared_conv(builder: Builder, op: Operation) -> bool:
    """A convolution by one set of weights for all rows."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args[:9]
    kernel = builder.constant(weight)
    values = None if bias is None else builder.constant(bias)
    if kernel is None or not x.numel or transposed or groups != 1 or set(dilation) != {1}:
        return False
    if kernel.dtype != torch.float32 or (bias is not None and values is None):
        return False
    values = None if values is None else values[None]
    # one number may stand for all dimensions
    stride, padding = (list(n) * (kernel.ndim - 2) if len(n) == 1 else n for n in (stride, padding))
    key = ("shared", weight, bias)
    return _convolved(builder, op, kernel[None], values, key, stride, padding, Runs(x.size[0]))


def _convolved(
    builder: Builder,
    op: Operation,
    stack: Any,
    bias: Any,
    key: tuple[Any, ...],
    stride: Any,
    padding: Any,
    runs: Runs | None,
    transposed: bool = False,
) -> bool:
    x = op.args[0]
    if stack.ndim not in (4, 5) or len(x.size) != stack.ndim - 1:
        return False
    if stack.ndim == 4:
        stack, stride, padding = stack.unsqueeze(3), (1, *stride), (0, *padding)
    pixels = image_pixels(builder, x, 1)
    out = pixels_of(op.outs[0], 1)
    if pixels is None or out is None or runs is None:
        return False
    value = Convolved(out, pixels, stack, bias, key, tuple(stride), tuple(padding), runs)
    builder.values[out.ref.storage] = by_phases(builder, value) if transposed else value
    return True


@lowers("aten.mm", "aten.addmm")
def shared_linear(builder: Builder, op: Operation) -> bool:
    """A linear layer by one set of weights for all rows."""
    *bias, x, matrix = op.args
    weight = builder.constant(matrix)
    values = builder.constant(bias[0]) if bias else None
    if weight is None or not x.numel or op.kwargs or (bias and (values is None or values.ndim != 1)):
        return False
    pixels, out = image_pixels(builder, x, -1), pixels_of(op.outs[0], -1)
    if pixels is None or out is None or weight.dtype != torch.float32:
        return False
    stack, values = weight.t()[None, :, :, None, None], None if values is None else values[None]
    builder.values[op.outs[0].storage] = Convolved(
        out, pixels, stack, values, ("shared", matrix, *bias), (1, 1), (0, 0), Runs(x.size[0])
    )
    return True


@lowers("fastens.linear")
def linear(builder: Builder, op: Operation) -> bool:
    """A member-batched linear layer: a convolution of 1x1 over tokens."""
    x, weight = op.args[:2]
    bias = argument(op, 2, "bias")
    stack = builder.constant(weight)
    extra = argument(op, 4, "activation", "none") != "none" or argument(op, 5, "members") is not None
    if stack is None or not x.numel or extra:
        return False
    runs = builder.runs(x.size[0], argument(op, 3, "offsets"), len(stack))
    pixels, out = image_pixels(builder, x, -1), pixels_of(op.outs[0], -1)
    if pixels is None or out is None:
        return False
    moved = out.reshaped(pixels.height, pixels.width)
    values = None if bias is None else builder.constant(bias)
    if moved is None or runs is None or (bias is not None and values is None):
        return False
    builder.values[op.outs[0].storage] = Convolved(
        moved, pixels, stack[:, :, :, None, None], values, ("linear", weight, bias), (1, 1), (0, 0), runs
    )
    return True


# Normalisation


@lowers("fastens.group_norm")
def group_norm(builder: Builder, op: Operation) -> bool:
    """Group normalisation, whose scale and shift a later node applies."""
    x, groups = op.args[:2]
    if not x.numel or _more_than_affine(op):
        return False
    weight, bias = argument(op, 2, "weight"), argument(op, 3, "bias")
    runs = builder.runs(x.size[0], argument(op, 5, "offsets"), _members(weight, bias))
    return _normed(builder, op, groups, weight, bias, float(argument(op, 4, "eps", 1e-5)), runs)


@lowers("aten.native_group_norm")
def shared_group_norm(builder: Builder, op: Operation) -> bool:
    """Group normalisation with one scale and shift for all rows; or only its moments, where they are what is used."""
    x, weight, bias, _, _, _, groups, eps = op.args
    if not x.numel:
        return False
    if any(builder.uses[out.storage] for out in op.outs[1:]):
        return _moments(builder, op)
    return _normed(builder, op, groups, weight, bias, float(eps), Runs(x.size[0]))


def _normed(
    builder: Builder, op: Operation, groups: int, weight: Any, bias: Any, eps: float, runs: Runs | None
) -> bool:
    pixels, out = image_pixels(builder, op.args[0], 1), pixels_of(op.outs[0], 1)
    affine = _affine(builder, weight, bias)
    if pixels is None or out is None or runs is None or affine is None:
        return False
    builder.values[op.outs[0].storage] = Normed(out, pixels, groups, eps, runs, *affine)
    return True


def _affine(builder: Builder, weight: Ref | None, bias: Ref | None) -> tuple[Constant | None, Constant | None] | None:
    """Weight and bias of a norm, [K, C] or [1, C], where it has them; none where one is not constant."""
    found: list[Constant | None] = []
    for ref in (weight, bias):
        stack = None if ref is None else builder.constant(ref)
        if ref is not None and stack is None:
            return None
        rows = None if stack is None else stack[None] if stack.ndim == 1 else stack.flatten(1)
        found.append(None if rows is None else Constant(("norm", ref), rows, stack))
    return found[0], found[1]


def _moments(builder: Builder, op: Operation) -> bool:
    """Mean and reciprocal deviation of each group, as derivatives take them, where the normalised values have no use.

    torch's own, of images with their channels last, lose digits where the mean is large beside the deviation.
    """
    x, weight, bias, _, channels, _, groups, eps = op.args
    normed, mean, rate = op.outs
    if not builder.target.tables:
        return False
    if weight is not None or bias is not None or builder.uses[normed.storage] or x.dtype not in builder.target.floats:
        return False
    pixels, runs = image_pixels(builder, x, 1), builder.runs(x.size[0], None, 1)
    if pixels is None or runs is None:
        return False
    scale, shift = builder.tables(Normed(pixels, pixels, groups, float(eps), runs, None, None))
    size, step = (x.size[0], groups), (channels, channels // groups)
    inputs = [View(table.where, table.offset, size, step) for table in (shift, scale)]
    code: dict[int, Code] = {
        rate.storage: [(Opcode.COPY, 1, 0, 0.0)],
        mean.storage: [(Opcode.DIVIDE, 0, 1, 0.0), (Opcode.MULTIPLY_NUMBER, 2, 0, -1.0)],
    }
    for storage, instructions in code.items():
        out = builder.table(*size)
        builder.pointwise(out, inputs, instructions)
        builder.values[storage] = Stored(out.where)
    return True


def _members(*parameters: Ref | None) -> int:
    """How many members have parameters of their own: those of a norm, which may have none."""
    return next((ref.size[0] for ref in parameters if ref is not None), 1)


def _more_than_affine(op: Operation) -> bool:
    """Whether a normalisation has more of its own beside its parameters: scale, shift, activation, masks."""
    extra = (argument(op, i, name) for i, name in ((6, "scale"), (7, "shift"), (9, "members")))
    return any(value is not None for value in extra) or argument(op, 8, "activation", "none") != "none"


@lowers("fastens.layer_norm", "aten.native_layer_norm")
def layer_norm(builder: Builder, op: Operation) -> bool:
    """Layer normalisation over the last dimension."""
    x, shape = op.args[:2]
    weight, bias = argument(op, 2, "weight"), argument(op, 3, "bias")
    whole = op.name == "fastens.layer_norm"
    if len(shape) != 1 or not x.numel or (whole and _more_than_affine(op)):
        return False
    if not whole and (weight is not None or bias is not None or any(builder.uses[o.storage] for o in op.outs[1:])):
        return False
    pixels, out = image_pixels(builder, x, -1), pixels_of(op.outs[0], -1)
    runs = builder.runs(x.size[0], argument(op, 5, "offsets") if whole else None, _members(weight, bias))
    if pixels is None or out is None or pixels.step is None or out.step is None or runs is None:
        return False
    affine = _affine(builder, weight, bias)
    if affine is None:
        return False
    buffer = builder.buffer(out.ref.numel, out.ref.dtype)
    image = builder.image(pixels)
    row, _, y, x = image.stride
    size = (out.rows, out.height * out.width, out.channels)
    read = View(image.where, image.offset, size, (row, x if pixels.width > 1 else y, 1))
    written = View(buffer, 0, size, (out.row, out.step, 1))
    builder.add(LayerNorm(written, read, *affine, float(argument(op, 4, "eps", 1e-5)), runs))
    builder.values[out.ref.storage] = Stored(buffer)
    return True


@lowers("aten.index_select")
def gather(builder: Builder, op: Operation) -> bool:
    """What is the member's of each row, where rows are dealt out when the program runs."""
    table, dim, index = op.args[:3]
    out, values = op.outs[0], builder.constant(table)
    dealt = builder.row_members is not None and builder.recording.row_members == index
    if not dealt or dim != 0 or table.dtype != torch.float32 or not out.numel:
        return False
    if values is None and not (builder.readable(table) and _in_line(table)):
        return False
    # the recorded result is contiguous, and so are its lines
    made, size = builder.buffer(out.numel), (out.size[0], out.numel // out.size[0])
    lines, members = (table.size[0], size[1]), builder.stored(index)
    if values is None:
        read = builder.stored(table)
        read = View(read.where, read.offset, lines, (size[1], 1))
    else:
        read = View(Constant(("gathered", table), values, values), 0, lines, (size[1], 1))
    builder.add(Gather(View(made, 0, size, (size[1], 1)), read, members))
    builder.values[out.storage] = Stored(made)
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
def cat(builder: Builder, op: Operation) -> bool:
    """Two images joined along the channels; anything else part by part."""
    parts, dim = op.args[0], argument(op, 1, "dim", 0)
    out = op.outs[0]
    if out.dtype not in builder.target.floats or any(part.dtype != out.dtype for part in parts):
        return False
    parts = [part for part in parts if part.numel]
    dim %= len(out.size)
    pixels = pixels_of(out, dim) if dim > 0 else None
    first, second = (pixels_of(part, dim) for part in parts) if dim > 0 and len(parts) == 2 else (None, None)
    inside = all(builder.constant(part) is not None or builder.readable(part) for part in parts)
    if pixels is not None and first is not None and second is not None and inside:
        builder.values[out.storage] = Joined(pixels, (first, second))
        return True
    buffer = builder.buffer(out.span, out.dtype)
    start = 0
    for part in parts:
        builder.expression(Leaf(part), View(buffer, start * out.stride[dim], part.size, out.stride))
        start += part.size[dim]
    builder.values[out.storage] = Stored(buffer)
    return True


@lowers("aten.stack")
def stack(builder: Builder, op: Operation) -> bool:
    """Tensors along a new dimension, one by one."""
    parts, dim = op.args[0], argument(op, 1, "dim", 0)
    out = op.outs[0]
    dim %= len(out.size)
    if (
        out.dtype not in builder.target.floats
        or any(part.dtype != out.dtype for part in parts)
        or len(out.size) > steps.MAX_DIMS
    ):
        return False
    buffer = builder.buffer(out.span, out.dtype)
    stride = (*out.stride[:dim], *out.stride[dim + 1 :])
    for i, part in enumerate(parts):
        builder.expression(Leaf(part), View(buffer, i * out.stride[dim], part.size, stride))
    builder.values[out.storage] = Stored(buffer)
    return True


@lowers("aten.upsample_nearest2d")
def upsample(builder: Builder, op: Operation) -> bool:
    """Nearest-neighbour enlargement by a whole number."""
    height, width = op.args[0].size[2:]
    factor = op.outs[0].size[2] // height if op.outs[0].numel else 0
    lines, columns = (torch.arange(n * factor, dtype=torch.float64) // max(1, factor) for n in (height, width))
    # which pixels torch takes depends on a given scale_factor and on rounding too: 2 become 6 by 3.2 as well as by 3
    numbers = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    if not torch.equal(op.func(numbers, *op.args[1:], **op.kwargs)[0, 0], lines[:, None] * width + columns):
        return False
    pixels, out = image_pixels(builder, op.args[0], 1, moved=True), pixels_of(op.outs[0], 1)
    if pixels is None or out is None:
        return False
    builder.values[out.ref.storage] = Enlarged(out, pixels, factor)
    return True


@lowers("aten.constant_pad_nd")
def pad(builder: Builder, op: Operation) -> bool:
    """Zeros around an image, and not around its channels."""
    padding = [*op.args[1], 0, 0, 0, 0][:4]
    if len(op.args[1]) > 2 * (len(op.outs[0].size) - 2):
        return False
    pixels, out = image_pixels(builder, op.args[0], 1, moved=True), pixels_of(op.outs[0], 1)
    value = argument(op, 2, "value", 0)
    if pixels is None or out is None or value or len(op.args[1]) > 4 or min(padding) < 0 or not out.ref.numel:
        return False
    builder.values[out.ref.storage] = Padded(out, pixels, tuple(padding))
    return True
