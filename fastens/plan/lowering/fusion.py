"""Fusion by need: what an operation does to a convolution or a norm that is not computed yet becomes a part of that.

Each rewrite returns whether it applied, with the new value under the result's storage. They hold only where the
operation is the one use of what it reads, which :func:`fastens.plan.lowering.registry.pending` says; a convolution is
``act(((conv(x) + row_bias) dropped + residual) s / d)``, and nothing is taken in before what was taken in already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastens.plan.graph import Mask, View
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.registry import pending
from fastens.plan.lowering.values import Apply, Convolved, Expression, Leaf, Normed, pixels_of
from fastens.program.steps import Opcode
from fastens.trace.record import Ref, same_view


def activation_in_epilogue(builder: Builder, out: Ref, x: Ref, activation: str) -> bool:
    """act(conv(x))  ->  conv(x, epilogue.output_activation=act)."""
    before = pending(builder, x)
    if before is None or before.activation != "none" or not _relaid(before, out):
        return False
    before.activation = activation
    builder.values[out.storage] = before
    return True


def number_in_epilogue(builder: Builder, out: Ref, x: Ref, number: float, divides: bool) -> bool:
    """conv(x) s  ->  conv(x, epilogue.output_scale=s); conv(x) / d  ->  conv(x, divisor=d)."""
    before = pending(builder, x)
    if before is None or before.activation != "none" or before.scaled or (divides and not builder.target.divides):
        return False
    if not _relaid(before, out):
        return False
    before.scale, before.divisor = (1.0, number) if divides else (number, 1.0)
    builder.values[out.storage] = before
    return True


def one_in_nothing(builder: Builder, out: Ref, x: Ref) -> bool:
    """conv(x) 1  ->  conv(x)."""
    value = builder.values.get(x.storage)
    if x.size != out.size or x.stride != out.stride or x.offset or builder.uses[x.storage] != 1:
        return False
    if not isinstance(value, Convolved) or not same_view(value.pixels.ref, x) or not _relaid(value, out):
        return False
    builder.values[out.storage] = value
    return True


def mask_in_epilogue(builder: Builder, out: Ref, x: Ref, mask: Mask) -> bool:
    """dropout(conv(x))  ->  conv(x, dropped), before a residual, a number and an activation."""
    before = pending(builder, x)
    if before is None or before.mask is not None or before.residual is not None or before.scaled:
        return False
    if before.activation != "none" or not _relaid(before, out):
        return False
    before.mask = mask
    builder.values[out.storage] = before
    return True


def row_bias_in_epilogue(builder: Builder, out: Ref, x: Ref, other: Ref) -> bool:
    """conv(x) + b, of one number for a row and channel  ->  conv(x, epilogue.row_bias=b)."""
    before = _open(builder, out, x)
    if before is None or before.row_bias is not None or before.residual is not None or before.mask is not None:
        return False
    if before.pixels.channel_dim != 1:  # of tokens, whose channels are last
        return False
    vector = row_vector(builder, other, out)
    if vector is None or not _relaid(before, out):
        return False
    before.row_bias = vector
    builder.values[out.storage] = before
    return True


def residual_in_epilogue(builder: Builder, out: Ref, x: Ref, other: Ref) -> bool:
    """conv(x) + r  ->  conv(x, epilogue.residual=r): saves one read and one write of the image."""
    before = _open(builder, out, x)
    if before is None or before.residual is not None or x.storage == other.storage:
        return False
    if other.size != out.size or other.dtype not in builder.target.floats:
        return False
    pixels = pixels_of(other, before.pixels.channel_dim)
    if pixels is None or (builder.constant(other) is None and not builder.readable(other)):
        return False
    residual = pixels.reshaped(before.pixels.height, before.pixels.width)
    if residual is None or not _relaid(before, out):
        return False
    if builder.constant(other) is None:
        builder.stored(other)
    before.residual = residual
    builder.values[out.storage] = before
    return True


def scale_in_norm(builder: Builder, out: Ref, x: Ref, other: Ref) -> bool:
    """norm(x) (1 + s), of one number for a row and channel  ->  norm(x, row_scale=s)."""
    value = _open_norm(builder, out, x)
    factor = builder.values.get(other.storage)
    root = factor.root if isinstance(factor, Expression) and same_view(factor.ref, other) else None
    if isinstance(factor, Expression) and factor.rounds:
        return False
    if value is None or value.row_scale is not None:
        return False
    if not isinstance(root, Apply) or (root.opcode, root.number) != (Opcode.ADD_NUMBER, 1.0):
        return False
    scale = root.operands[0]
    vector = row_vector(builder, scale.ref, out) if isinstance(scale, Leaf) else None
    return vector is not None and _modulated(builder, out, value, row_scale=vector)


def shift_in_norm(builder: Builder, out: Ref, x: Ref, other: Ref) -> bool:
    """norm(x) + t, of one number for a row and channel  ->  norm(x, row_shift=t)."""
    value = _open_norm(builder, out, x)
    vector = None if value is None else row_vector(builder, other, out)
    return value is not None and vector is not None and _modulated(builder, out, value, row_shift=vector)


def scale_and_shift_in_norm(builder: Builder, out: Ref, x: Ref, factor: Ref, shift: Ref) -> bool:
    """norm(x) (1 + s) + t, as one operation  ->  norm(x, row_scale=s, row_shift=t)."""
    vector = row_vector(builder, shift, out)
    if vector is None or not scale_in_norm(builder, out, x, factor):
        return False
    value = builder.values[out.storage]
    assert isinstance(value, Normed)
    value.row_shift = vector
    return True


Sum = Callable[[Builder, Ref, Ref, Ref], bool]
# A vector is added before an image, which a row's bias comes before; a norm's shift is what is left.
SUMS: tuple[Sum, ...] = (row_bias_in_epilogue, residual_in_epilogue, shift_in_norm)
PRODUCTS: tuple[Sum, ...] = (scale_in_norm,)


def row_vector(builder: Builder, ref: Ref, out: Ref) -> View | None:
    """A view [R, C] of a tensor with one value per row and channel, [R, C, 1, 1]; none where it is not.

    A constant may have one value per channel, [1, C, 1, 1].
    """
    if len(out.size) != 4 or ref.size[1:] != (out.size[1], 1, 1) or ref.dtype not in builder.target.floats:
        return None
    constant = builder.constant(ref) is not None
    if ref.size[0] != out.size[0] and (ref.size[0] != 1 or not constant):
        return None
    if not constant and (not builder.readable(ref) or (ref.stride[1] != 1 and ref.size[1] != 1)):
        return None
    x = builder.operand(ref)
    whole = View(x.where, x.offset, out.size[:2], (x.stride[0], 1))
    return whole if x.stride[1] == 1 or ref.size[1] == 1 else None


def _open(builder: Builder, out: Ref, x: Ref) -> Convolved | None:
    """The convolution that something may be added to yet."""
    before = pending(builder, x)
    if before is None or before.scaled or before.activation != "none" or x.size != out.size:
        return None
    return before


def _open_norm(builder: Builder, out: Ref, x: Ref) -> Normed | None:
    """The norm that may be scaled and shifted yet."""
    value = builder.values.get(x.storage)
    if not isinstance(value, Normed) or builder.uses[x.storage] != 1 or value.tables is not None:
        return None
    if not same_view(value.pixels.ref, x) or x.size != out.size or value.row_shift is not None:
        return None
    return value if pixels_of(out, 1) is not None else None


def _modulated(builder: Builder, out: Ref, value: Normed, **fields: View) -> bool:
    result = pixels_of(out, 1)
    assert result is not None
    builder.values[out.storage] = dataclasses.replace(value, pixels=result, **fields)
    return True


def _relaid(before: Convolved, out: Ref) -> bool:
    """Let a convolution write to where the operation after it would; return whether the layouts agree."""
    ref = before.pixels.ref
    if ref.size != out.size or ref.stride != out.stride or out.offset != 0:
        return False
    before.pixels = dataclasses.replace(before.pixels, ref=out)
    return True
