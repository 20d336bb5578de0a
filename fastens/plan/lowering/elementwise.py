"""Lowering of elementwise operations and copies, into the steps before and after where one takes them."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch

from fastens.plan.cpu.loops import joined
from fastens.plan.lowering.attention import kept_scores
from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.registry import argument, call_into, lowers, pending
from fastens.plan.lowering.values import (
    Activated,
    Apply,
    Convolved,
    Expression,
    Leaf,
    Normed,
    Stored,
    collect_leaves,
    pixels_of,
)
from fastens.plan.memory import At, address_unit
from fastens.program import steps
from fastens.program.steps import Activation, Opcode
from fastens.trace.record import Node, Ref, same_view

# Elementwise operations

UNARY = {
    "silu": Opcode.SILU,
    "sigmoid": Opcode.SIGMOID,
    "tanh": Opcode.TANH,
    "exp": Opcode.EXP,
    "log": Opcode.LOG,
    "sin": Opcode.SIN,
    "cos": Opcode.COS,
    "sqrt": Opcode.SQRT,
    "relu": Opcode.RELU,
    "abs": Opcode.ABS,
}
_IN_STEP = {Opcode.SILU: Activation.SILU, Opcode.GELU: Activation.GELU, Opcode.GELU_TANH: Activation.GELU_TANH}


@lowers("aten.gelu", *(f"aten.{name}" for name in UNARY), *(f"aten.{name}_" for name in UNARY))
def unary(emitter: Emitter, node: Node) -> bool:
    """An activation, taken into the step before or after where one can."""
    x, out = node.args[0], node.outs[0]
    name = node.name.removeprefix("aten.").rstrip("_")
    if name == "gelu":
        opcode = Opcode.GELU_TANH if argument(node, 1, "approximate", "none") == "tanh" else Opcode.GELU
    else:
        opcode = UNARY[name]
    if opcode is Opcode.LOG and not emitter.typed and out.dtype == torch.float32:
        return False  # torch's own: embeddings multiply log(sigma) by 100 to 1000, and with it what its last bit is off
    activation = _IN_STEP.get(opcode)
    if activation is not None and x.dtype in emitter.floats:
        before = pending(emitter, x)
        if before is not None and before.activation is Activation.NONE and relaid(before, out):
            before.activation = activation
            emitter.values[out.storage] = before
            return True
        for dim in (1, -1):
            pixels, result = pixels_of(x, dim), pixels_of(out, dim)
            if pixels is not None and result is not None and emitter.is_wide(x) and len(out.size) > 1:
                emitter.values[out.storage] = Activated(result, pixels, activation)
                return True
    return express(emitter, out, opcode, (x,))


def relaid(before: Convolved, out: Ref) -> bool:
    """Let a convolution write to where the operation after it would; return whether the layouts agree."""
    ref = before.pixels.ref
    if ref.size != out.size or ref.stride != out.stride or out.offset != 0:
        return False
    before.pixels = dataclasses.replace(before.pixels, ref=out)
    return True


BINARY = {"add": Opcode.ADD, "sub": Opcode.SUBTRACT, "mul": Opcode.MULTIPLY, "div": Opcode.DIVIDE}


@lowers(*(f"aten.{name}" for name in BINARY), *(f"aten.{name}_" for name in BINARY))
def binary(emitter: Emitter, node: Node) -> bool:
    """Arithmetic, taken into the convolution or normalisation before where it can be."""
    a, b = node.args[:2]
    out = node.outs[0]
    opcode = BINARY[node.name.removeprefix("aten.").rstrip("_")]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        return False
    for ref, other in ((a, b), (b, a)):
        one = emitter.constant(other) if isinstance(other, Ref) and isinstance(ref, Ref) else None
        whole = one is not None and opcode is Opcode.MULTIPLY and ref.size == out.size and ref.dtype == out.dtype
        if whole and bool((one == 1).all()):  # as networks do to bring timesteps to the batch
            emitter.values[out.storage] = Expression(out, Leaf(ref))
            return True
    if out.dtype not in emitter.floats:
        return False
    if not isinstance(b, Ref):
        return _with_number(emitter, out, opcode, a, float(b))
    if not isinstance(a, Ref):
        return False
    for x, other in ((a, b), (b, a)):
        if opcode is Opcode.ADD and _added(emitter, out, x, other):
            return True
        only_use = emitter.uses[x.storage] == 1 and opcode in (Opcode.ADD, Opcode.MULTIPLY)
        if only_use and _modulated(emitter, out, opcode, x, other):
            return True
    return express(emitter, out, opcode, (a, b))


def _with_number(emitter: Emitter, out: Ref, opcode: Opcode, x: Ref, number: float) -> bool:
    if opcode is Opcode.SUBTRACT:
        opcode, number = Opcode.ADD, -number
    if opcode is Opcode.ADD:
        return express(emitter, out, Opcode.ADD_NUMBER, (x,), number)
    if opcode is Opcode.DIVIDE and has_exact_reciprocal(number):
        opcode, number = Opcode.MULTIPLY, 1 / number
    divides = opcode is Opcode.DIVIDE
    numbered = Opcode.DIVIDE_NUMBER if divides else Opcode.MULTIPLY_NUMBER
    # the one place where the reciprocal stands for a division: in an exponent of softmax, whose own error is larger;
    # what reads the scores otherwise gets them divided
    factor = 1 / number if divides and number else number
    ordinary = partial(express, emitter, out, numbered, (x,), number)
    if number and kept_scores(emitter, x, out, factor, ordinary):
        return True
    if not divides and number == 1.0 and x.size == out.size and x.stride == out.stride:
        value = emitter.values.get(x.storage)
        if value is not None and emitter.uses[x.storage] == 1 and x.offset == 0 and _moved(value, x, out):
            emitter.values[out.storage] = value
            return True
    before = pending(emitter, x)
    free = before is not None and before.activation is Activation.NONE and not before.scaled
    if divides and emitter.typed:  # launches of convolutions only multiply
        free = False
    if before is not None and free and relaid(before, out):
        before.scale, before.divisor = (1.0, number) if divides else (number, 1.0)
        emitter.values[out.storage] = before
        return True
    return express(emitter, out, numbered, (x,), number)


def has_exact_reciprocal(number: float) -> bool:
    """Whether ``x / number`` and ``x * (1 / number)`` are one in float32 for every x: of powers of two."""
    mantissa, exponent = math.frexp(number)
    return abs(mantissa) == 0.5 and abs(exponent - 1) <= 126


def _moved(value: Any, x: Ref, out: Ref) -> bool:
    return isinstance(value, Convolved) and same_view(value.pixels.ref, x) and relaid(value, out)


def row_vector(emitter: Emitter, ref: Ref, out: Ref) -> tuple[At, int] | None:
    """Place and row stride of a tensor with one value per row and channel, [R, C, 1, 1]; none where it is not.

    A constant may have one value per channel, [1, C, 1, 1].
    """
    if len(out.size) != 4 or ref.size[1:] != (out.size[1], 1, 1) or ref.dtype not in emitter.floats:
        return None
    if ref.size[0] != out.size[0] and (ref.size[0] != 1 or emitter.constant(ref) is None):
        return None
    if emitter.constant(ref) is not None:
        at, stride, _ = emitter.operand(ref)
        return (at, stride[0]) if stride[1] == 1 or ref.size[1] == 1 else None
    if (ref.stride[1] != 1 and ref.size[1] != 1) or not emitter.is_wide(ref):
        return None
    return emitter.stored(ref), ref.stride[0]


def _added(emitter: Emitter, out: Ref, x: Ref, other: Ref) -> bool:
    before = pending(emitter, x)
    if before is None or before.scaled or before.activation is not Activation.NONE or x.size != out.size:
        return False
    if before.row_vector is None and before.residual is None and before.mask is None:
        vector = row_vector(emitter, other, out)
        if vector is not None and relaid(before, out):
            before.row_vector = vector
            emitter.values[out.storage] = before
            return True
    if before.residual is not None or other.size != out.size or other.dtype not in emitter.floats:
        return False
    if x.storage == other.storage:
        return False
    pixels = pixels_of(other, 1 if len(out.size) == 4 else -1)
    if pixels is None or (emitter.constant(other) is None and not emitter.is_wide(other)):
        return False
    residual = pixels.reshaped(before.pixels.height, before.pixels.width)
    if residual is None or not relaid(before, out):
        return False
    if emitter.constant(other) is None:
        emitter.stored(other)
    before.residual = residual
    emitter.values[out.storage] = before
    return True


@lowers("aten.addcmul")
def scaled_and_shifted(emitter: Emitter, node: Node) -> bool:
    """Shift + x * factor: of a normalisation by row, as in EDM's blocks, or any other."""
    shift, x, factor = node.args[:3]
    out = node.outs[0]
    if argument(node, 3, "value", 1) != 1 or out.dtype not in emitter.floats:
        return False
    by_row = row_vector(emitter, shift, out) is not None and emitter.uses[x.storage] == 1
    if by_row and _modulated(emitter, out, Opcode.MULTIPLY, x, factor):
        return _modulated(emitter, out, Opcode.ADD, out, shift)
    if any(ref.dtype not in emitter.floats for ref in (shift, x, factor)):
        return False
    scaled = Apply(Opcode.MULTIPLY, (Leaf(x), Leaf(factor)))
    emitter.values[out.storage] = Expression(out, Apply(Opcode.ADD, (Leaf(shift), scaled)))
    return True


def _modulated(emitter: Emitter, out: Ref, opcode: Opcode, x: Ref, other: Ref) -> bool:
    """Scale and shift by row: norm (1 + scale) + shift. ``x`` must have no other use."""
    value = emitter.values.get(x.storage)
    if not isinstance(value, Normed) or value.tables is not None:
        return False
    if not same_view(value.pixels.ref, x) or x.size != out.size or value.row_shift is not None:
        return False
    result = pixels_of(out, 1)
    if result is None:
        return False
    if opcode is Opcode.ADD:
        vector = row_vector(emitter, other, out)
        if vector is None:
            return False
        value.row_shift = vector
    else:
        factor = emitter.values.get(other.storage)
        root = factor.root if isinstance(factor, Expression) and same_view(factor.ref, other) else None
        if not isinstance(root, Apply) or (root.opcode, root.number) != (Opcode.ADD_NUMBER, 1.0):
            return False
        scale = root.operands[0]
        if value.row_scale is not None or not isinstance(scale, Leaf):
            return False
        vector = row_vector(emitter, scale.ref, out)
        if vector is None:
            return False
        value.row_scale = vector
    emitter.values[out.storage] = dataclasses.replace(value, pixels=result)
    return True


def _inlined(emitter: Emitter, ref: Ref) -> Leaf | Apply:
    """The expression that a value is kept as, where this is its only use; otherwise the value as a leaf."""
    value = emitter.values.get(ref.storage)
    alone = emitter.uses[ref.storage] == 1
    return value.root if isinstance(value, Expression) and same_view(value.ref, ref) and alone else Leaf(ref)


def express(emitter: Emitter, out: Ref, opcode: Opcode, operands: tuple[Ref, ...], number: float = 0.0) -> bool:
    """Keep an elementwise operation as an expression, joined with those that it is the only use of."""
    if out.dtype not in emitter.floats or any(ref.dtype not in emitter.floats for ref in operands):
        return False
    roots = (_inlined(emitter, ref) if ref.size == out.size else Leaf(ref) for ref in operands)
    whole = Apply(opcode, tuple(roots), number)
    if not _fits(whole):
        whole = Apply(opcode, tuple(Leaf(ref) for ref in operands), number)
    emitter.values[out.storage] = Expression(out, whole)
    return True


def _fits(root: Apply) -> bool:
    leaves: list[Leaf] = []
    collect_leaves(root, leaves)

    def count(node: Leaf | Apply) -> int:
        return 0 if isinstance(node, Leaf) else 1 + sum(map(count, node.operands))

    return len(leaves) <= steps.MAX_INPUTS and count(root) <= steps.MAX_INSTRUCTIONS


@lowers("aten.silu_backward")
def silu_backward(emitter: Emitter, node: Node) -> bool:
    """``g s (1 + x (1 - s))`` with ``s = sigmoid(x)``."""
    gradient, x, out = *node.args[:2], node.outs[0]
    if any(ref.dtype not in emitter.floats for ref in (gradient, x, out)):
        return False
    share = Apply(Opcode.SIGMOID, (Leaf(x),))
    inner = Apply(Opcode.MULTIPLY, (Leaf(x), Apply(Opcode.NUMBER_MINUS, (share,), 1.0)))
    slope = Apply(Opcode.MULTIPLY, (share, Apply(Opcode.ADD_NUMBER, (inner,), 1.0)))
    whole = Apply(Opcode.MULTIPLY, (_inlined(emitter, gradient), slope))  # a product is taken along
    if not _fits(whole) or gradient.size != out.size:
        whole = Apply(Opcode.MULTIPLY, (Leaf(gradient), slope))
    emitter.values[out.storage] = Expression(out, whole)
    return True


@lowers("aten.reciprocal", "aten.pow", "aten.neg", "aten.rsqrt")
def power(emitter: Emitter, node: Node) -> bool:
    """Powers that have an instruction, or two."""
    x, out = node.args[0], node.outs[0]
    if node.name == "aten.rsqrt":
        if x.dtype not in emitter.floats or out.dtype != x.dtype:
            return False
        emitter.values[out.storage] = Expression(out, Apply(Opcode.NUMBER_OVER, (Apply(Opcode.SQRT, (Leaf(x),)),), 1.0))
        return True
    if node.name == "aten.reciprocal":
        return express(emitter, out, Opcode.NUMBER_OVER, (x,), 1.0)
    if node.name == "aten.neg":
        return express(emitter, out, Opcode.MULTIPLY_NUMBER, (x,), -1.0)
    exponent = node.args[1]
    opcode = {2.0: Opcode.SQUARE, 0.5: Opcode.SQRT}.get(exponent) if isinstance(exponent, int | float) else None
    return isinstance(x, Ref) and opcode is not None and express(emitter, out, opcode, (x,))


@lowers("aten._to_copy", "aten.clone", "aten.alias_copy", "aten.contiguous")
def copy(emitter: Emitter, node: Node) -> bool:
    """A copy in another layout or dtype."""
    x, out = node.args[0], node.outs[0]
    if out.dtype not in emitter.floats or not emitter.copies_from(x.dtype):
        return False
    if len(joined(list(out.size), [list(out.stride), list(x.stride)])) > steps.MAX_DIMS:
        return False  # patches of videos put together: torch knows more dimensions
    if kept_scores(emitter, x, out, 1.0, partial(_copied, emitter, x, out)):
        return True
    _copied(emitter, x, out)
    return True


def _copied(emitter: Emitter, x: Ref, out: Ref) -> None:
    value = emitter.values.get(x.storage)
    if isinstance(value, Expression) and same_view(value.ref, x) and emitter.uses[x.storage] == 1:
        emitter.values[out.storage] = Expression(out, value.root)
    else:
        emitter.values[out.storage] = Expression(out, Leaf(x))


@lowers("aten.repeat")
def repeat(emitter: Emitter, node: Node) -> bool:
    """Copies along the first dimension, of any dtype."""
    x, times = node.args[:2]
    out = node.outs[0]
    if not emitter.copies_from(out.dtype) or len(times) != len(x.size) or any(n != 1 for n in times[1:]):
        return False
    at, stride, code = emitter.operand(x)
    size = address_unit(out.dtype)
    place = At(emitter.buffer(out.numel, out.dtype))
    out_code = 0 if out.dtype in emitter.floats else code
    sizes, out_stride = [times[0], *x.size], [x.size[0] * out.stride[0], *out.stride]
    source = steps.Strided(at, code, [0, *(0 if n == 1 else s for n, s in zip(x.size, stride, strict=True))])
    emitter.pointwise(sizes, steps.Strided(place, out_code, out_stride), [source], [(Opcode.COPY, 0, 0, 0.0)])
    emitter.values[out.storage] = Stored(place, size)
    return True


@lowers("aten.copy_")
def partial_copy(emitter: Emitter, node: Node) -> bool:
    """A copy into a part of a value, or in place of a whole one."""
    (out, x), written = node.args[:2], node.outs[0]
    in_step = out.dtype in emitter.floats and emitter.copies_from(x.dtype)
    if not same_view(out, written):  # the whole, under another name
        if in_step:
            emitter.values[written.storage] = Expression(written, Leaf(x))
        return in_step
    for storage in list(emitter.values):  # whatever still waits may read what is overwritten here
        emitter.store(storage)
    for ref in [ref for ref in emitter.copies if ref.storage == out.storage]:
        del emitter.copies[ref]
    if in_step:
        emitter.expression(Leaf(x), out.size, emitter.stored(out), out.stride, 0)
    else:
        call_into(emitter, node)
    return True


_FILLS = {"aten.zero_": 0.0, "aten.zeros_like": 0.0, "aten.new_zeros": 0.0, "aten.ones_like": 1.0, "aten.new_ones": 1.0}


@lowers(*_FILLS, "aten.fill_", "aten.full_like", "aten.new_full")
def fill(emitter: Emitter, node: Node) -> bool:
    """One number, or a constant of one element, everywhere."""
    out = node.outs[0]
    value = _FILLS.get(node.name, node.args[-1])
    if out.dtype not in emitter.floats or emitter.typed:
        return False
    if isinstance(value, Ref):
        found = emitter.constant(value)
        if found is None or not found.is_floating_point() or found.ndim:
            return False
        value = found.item()
    if not isinstance(value, bool | int | float):
        return False
    emitter.values[out.storage] = Expression(out, Leaf(emitter.recording.ref(torch.full((), value, dtype=out.dtype))))
    return True


@lowers("aten.new_empty", "aten.empty_like", "aten.new_empty_strided")
def empty(emitter: Emitter, node: Node) -> bool:
    """Memory that is written later."""
    out = node.outs[0]
    if out.dtype not in emitter.floats:
        return False
    emitter.values[out.storage] = Stored(At(emitter.buffer(out.numel, out.dtype)))
    return True
