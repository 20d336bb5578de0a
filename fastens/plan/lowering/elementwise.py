"""Lowering of elementwise operations and copies, into the nodes before and after where one takes them."""

from __future__ import annotations

import math
from functools import partial

import torch

from fastens.plan.graph import View
from fastens.plan.loops import in_line
from fastens.plan.lowering.attention import kept_scores
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.fusion import (
    PRODUCTS,
    SUMS,
    activation_in_epilogue,
    number_in_epilogue,
    one_in_nothing,
    scale_and_shift_in_norm,
)
from fastens.plan.lowering.registry import argument, call_into, lowers
from fastens.plan.lowering.values import (
    Activated,
    Apply,
    Expression,
    Leaf,
    Stored,
    collect_leaves,
    is_rounded,
    pixels_of,
)
from fastens.program import steps
from fastens.program.steps import Opcode
from fastens.trace.record import Operation, Ref, same_view

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
_IN_STEP = {Opcode.SILU: "silu", Opcode.GELU: "gelu", Opcode.GELU_TANH: "gelu_tanh"}


@lowers("aten.gelu", *(f"aten.{name}" for name in UNARY), *(f"aten.{name}_" for name in UNARY))
def unary(builder: Builder, op: Operation) -> bool:
    """An activation, taken into the node before or after where one can."""
    x, out = op.args[0], op.outs[0]
    name = op.name.removeprefix("aten.").rstrip("_")
    if name == "gelu":
        opcode = Opcode.GELU_TANH if argument(op, 1, "approximate", "none") == "tanh" else Opcode.GELU
    else:
        opcode = UNARY[name]
    if opcode is Opcode.LOG and not builder.target.exact_log and out.dtype == torch.float32:
        return False  # torch's own: embeddings multiply log(sigma) by 100 to 1000, and with it what its last bit is off
    activation = _IN_STEP.get(opcode)
    if activation is not None and x.dtype in builder.target.floats:
        if activation_in_epilogue(builder, out, x, activation):
            return True
        for dim in (1, -1):
            pixels, result = pixels_of(x, dim), pixels_of(out, dim)
            if pixels is not None and result is not None and builder.readable(x) and len(out.size) > 1:
                builder.values[out.storage] = Activated(result, pixels, activation)
                return True
    return express(builder, out, opcode, (x,))


BINARY = {"add": Opcode.ADD, "sub": Opcode.SUBTRACT, "mul": Opcode.MULTIPLY, "div": Opcode.DIVIDE}


@lowers(*(f"aten.{name}" for name in BINARY), *(f"aten.{name}_" for name in BINARY))
def binary(builder: Builder, op: Operation) -> bool:
    """Arithmetic, taken into the convolution or normalisation before where it can be."""
    a, b = op.args[:2]
    out = op.outs[0]
    opcode = BINARY[op.name.removeprefix("aten.").rstrip("_")]
    if argument(op, 2, "alpha", 1) != 1 or op.kwargs.get("rounding_mode") is not None:
        return False
    for ref, other in ((a, b), (b, a)):
        one = builder.constant(other) if isinstance(other, Ref) and isinstance(ref, Ref) else None
        whole = one is not None and opcode is Opcode.MULTIPLY and ref.size == out.size and ref.dtype == out.dtype
        # as networks do to bring timesteps to the batch
        if whole and ref.dtype in builder.target.copied and bool((one == 1).all()):
            builder.values[out.storage] = Expression(out, Leaf(ref))
            return True
    if out.dtype not in builder.target.floats:
        return False
    if not isinstance(b, Ref):
        return _with_number(builder, out, opcode, a, float(b))
    if not isinstance(a, Ref):
        return False
    for x, other in ((a, b), (b, a)):
        rewrites = SUMS if opcode is Opcode.ADD else PRODUCTS if opcode is Opcode.MULTIPLY else ()
        if any(rewrite(builder, out, x, other) for rewrite in rewrites):
            return True
    return express(builder, out, opcode, (a, b))


def _with_number(builder: Builder, out: Ref, opcode: Opcode, x: Ref, number: float) -> bool:
    if opcode is Opcode.SUBTRACT:
        opcode, number = Opcode.ADD, -number
    if opcode is Opcode.ADD:
        return express(builder, out, Opcode.ADD_NUMBER, (x,), number)
    if opcode is Opcode.DIVIDE and has_exact_reciprocal(number):
        opcode, number = Opcode.MULTIPLY, 1 / number
    divides = opcode is Opcode.DIVIDE
    numbered = Opcode.DIVIDE_NUMBER if divides else Opcode.MULTIPLY_NUMBER
    # the one place where the reciprocal stands for a division: in an exponent of softmax, whose own error is larger;
    # what reads the scores otherwise gets them divided
    factor = 1 / number if divides and number else number
    ordinary = partial(express, builder, out, numbered, (x,), number)
    if number and kept_scores(builder, x, out, factor, ordinary):
        return True
    if number == 1.0 and not divides and one_in_nothing(builder, out, x):
        return True
    if number_in_epilogue(builder, out, x, number, divides):
        return True
    return express(builder, out, numbered, (x,), number)


def has_exact_reciprocal(number: float) -> bool:
    """Whether ``x / number`` and ``x * (1 / number)`` are one in float32 for every x: of powers of two."""
    mantissa, exponent = math.frexp(number)
    return abs(mantissa) == 0.5 and abs(exponent - 1) <= 126


@lowers("aten.addcmul")
def scaled_and_shifted(builder: Builder, op: Operation) -> bool:
    """Shift + x * factor: of a normalisation by row, as in EDM's blocks, or any other."""
    shift, x, factor = op.args[:3]
    out = op.outs[0]
    if argument(op, 3, "value", 1) != 1 or out.dtype not in builder.target.floats:
        return False
    if scale_and_shift_in_norm(builder, out, x, factor, shift):
        return True
    if any(ref.dtype not in builder.target.floats for ref in (shift, x, factor)):
        return False
    scaled = Apply(Opcode.MULTIPLY, (Leaf(x), Leaf(factor)))
    builder.values[out.storage] = Expression(out, Apply(Opcode.ADD, (Leaf(shift), scaled)))
    return True


def _inlined(builder: Builder, ref: Ref) -> Leaf | Apply:
    """The expression that a value is kept as, where this is its only use; otherwise the value as a leaf."""
    value = builder.values.get(ref.storage)
    alone = builder.uses[ref.storage] == 1
    if isinstance(value, Expression) and same_view(value.ref, ref) and alone and not value.rounds:
        return value.root
    return Leaf(ref)


def express(builder: Builder, out: Ref, opcode: Opcode, operands: tuple[Ref, ...], number: float = 0.0) -> bool:
    """Keep an elementwise operation as an expression, joined with those that it is the only use of."""
    if out.dtype not in builder.target.floats or any(ref.dtype not in builder.target.floats for ref in operands):
        return False
    roots = (_inlined(builder, ref) if ref.size == out.size else Leaf(ref) for ref in operands)
    whole = Apply(opcode, tuple(roots), number)
    if not _fits(whole):
        whole = Apply(opcode, tuple(Leaf(ref) for ref in operands), number)
    builder.values[out.storage] = Expression(out, whole)
    return True


def _fits(root: Apply) -> bool:
    leaves: list[Leaf] = []
    collect_leaves(root, leaves)

    def count(op: Leaf | Apply) -> int:
        return 0 if isinstance(op, Leaf) else 1 + sum(map(count, op.operands))

    return len(leaves) <= steps.MAX_INPUTS and count(root) <= steps.MAX_INSTRUCTIONS


@lowers("aten.silu_backward")
def silu_backward(builder: Builder, op: Operation) -> bool:
    """``g s (1 + x (1 - s))`` with ``s = sigmoid(x)``."""
    gradient, x, out = *op.args[:2], op.outs[0]
    if any(ref.dtype not in builder.target.floats for ref in (gradient, x, out)):
        return False
    share = Apply(Opcode.SIGMOID, (Leaf(x),))
    inner = Apply(Opcode.MULTIPLY, (Leaf(x), Apply(Opcode.NUMBER_MINUS, (share,), 1.0)))
    slope = Apply(Opcode.MULTIPLY, (share, Apply(Opcode.ADD_NUMBER, (inner,), 1.0)))
    whole = Apply(Opcode.MULTIPLY, (_inlined(builder, gradient), slope))  # a product is taken along
    if not _fits(whole) or gradient.size != out.size:
        whole = Apply(Opcode.MULTIPLY, (Leaf(gradient), slope))
    builder.values[out.storage] = Expression(out, whole)
    return True


@lowers("aten.reciprocal", "aten.pow", "aten.neg", "aten.rsqrt")
def power(builder: Builder, op: Operation) -> bool:
    """Powers that have an instruction, or two."""
    x, out = op.args[0], op.outs[0]
    if op.name == "aten.rsqrt":
        if x.dtype not in builder.target.floats or out.dtype != x.dtype:
            return False
        builder.values[out.storage] = Expression(out, Apply(Opcode.NUMBER_OVER, (Apply(Opcode.SQRT, (Leaf(x),)),), 1.0))
        return True
    if op.name == "aten.reciprocal":
        return express(builder, out, Opcode.NUMBER_OVER, (x,), 1.0)
    if op.name == "aten.neg":
        return express(builder, out, Opcode.MULTIPLY_NUMBER, (x,), -1.0)
    exponent = op.args[1]
    opcode = {2.0: Opcode.SQUARE, 0.5: Opcode.SQRT}.get(exponent) if isinstance(exponent, int | float) else None
    return isinstance(x, Ref) and opcode is not None and express(builder, out, opcode, (x,))


@lowers("aten._to_copy", "aten.clone", "aten.alias_copy", "aten.contiguous")
def copy(builder: Builder, op: Operation) -> bool:
    """A copy in another layout or dtype."""
    x, out = op.args[0], op.outs[0]
    if out.dtype not in builder.target.floats or x.dtype not in builder.target.copied:
        return False
    if len(in_line(list(out.size), [list(out.stride), list(x.stride)])) > steps.MAX_DIMS:
        return False  # patches of videos put together: torch knows more dimensions
    if kept_scores(builder, x, out, 1.0, partial(_copied, builder, x, out)):
        return True
    _copied(builder, x, out)
    return True


def _copied(builder: Builder, x: Ref, out: Ref) -> None:
    value = builder.values.get(x.storage)
    root, rounds = Leaf(x), is_rounded(x, out)
    alone, same = builder.uses[x.storage] == 1, out.dtype == x.dtype
    if isinstance(value, Expression) and same_view(value.ref, x) and alone and (same or not value.rounds):
        root, rounds = value.root, value.rounds or rounds
    builder.values[out.storage] = Expression(out, root, rounds)


@lowers("aten.repeat")
def repeat(builder: Builder, op: Operation) -> bool:
    """Copies along the first dimension, of any dtype."""
    x, times = op.args[:2]
    out = op.outs[0]
    if out.dtype not in builder.target.copied or len(times) != len(x.size) or any(n != 1 for n in times[1:]):
        return False
    source = builder.operand(x)
    where = builder.buffer(out.numel, out.dtype)
    size = (times[0], *x.size)
    stride = (0, *(0 if n == 1 else s for n, s in zip(x.size, source.stride, strict=True)))
    written = View(where, 0, size, (x.size[0] * out.stride[0], *out.stride))
    builder.pointwise(written, [View(source.where, source.offset, size, stride)], [(Opcode.COPY, 0, 0, 0.0)])
    builder.values[out.storage] = Stored(where)
    return True


@lowers("aten.copy_")
def partial_copy(builder: Builder, op: Operation) -> bool:
    """A copy into a part of a value, or in place of a whole one."""
    (out, x), written = op.args[:2], op.outs[0]
    in_step = out.dtype in builder.target.floats and x.dtype in builder.target.copied
    if not same_view(out, written):  # the whole, under another name
        if in_step:
            builder.values[written.storage] = Expression(written, Leaf(x), is_rounded(x, written))
        return in_step
    for storage in list(builder.values):  # whatever still waits may read what is overwritten here
        builder.store(storage)
    for ref in [ref for ref in builder.copies if ref.storage == out.storage]:
        del builder.copies[ref]
    if in_step and not (builder.target.widens and is_rounded(x, out)):
        builder.expression(Leaf(x), builder.stored(out))
    else:
        call_into(builder, op)
    return True


_FILLS = {"aten.zero_": 0.0, "aten.zeros_like": 0.0, "aten.new_zeros": 0.0, "aten.ones_like": 1.0, "aten.new_ones": 1.0}


@lowers(*_FILLS, "aten.fill_", "aten.full_like", "aten.new_full")
def fill(builder: Builder, op: Operation) -> bool:
    """One number, or a constant of one element, everywhere."""
    out = op.outs[0]
    value = _FILLS.get(op.name, op.args[-1])
    if out.dtype not in builder.target.floats or not builder.target.fills:
        return False
    if isinstance(value, Ref):
        found = builder.constant(value)
        if found is None or not found.is_floating_point() or found.ndim:
            return False
        value = found.item()
    if not isinstance(value, bool | int | float):
        return False
    builder.values[out.storage] = Expression(out, Leaf(builder.recording.ref(torch.full((), value, dtype=out.dtype))))
    return True


@lowers("aten.new_empty", "aten.empty_like", "aten.new_empty_strided")
def empty(builder: Builder, op: Operation) -> bool:
    """Memory that is written later."""
    out = op.outs[0]
    if out.dtype not in builder.target.floats:
        return False
    builder.values[out.storage] = Stored(builder.buffer(out.span, out.dtype))
    return True
