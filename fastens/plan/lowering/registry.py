"""From a recording to a graph: one handler per operation, which leaves to a later node what that can compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastens.plan.graph import TorchCall, View
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.origin import origin
from fastens.plan.lowering.values import (
    Convolved,
    Expression,
    Leaf,
    Pixels,
    Stored,
    pixels_of,
)
from fastens.plan.memory import Argument
from fastens.trace.functionalize import contiguous
from fastens.trace.record import NotLowerable, Operation, Ref, mapped, same_view

Handler = Callable[[Builder, Operation], bool]
HANDLERS: dict[str, Handler] = {}


def lowers(*names: str) -> Callable[[Handler], Handler]:
    """Register what lowers operations; it returns False for a form that it does not take.

    Raises:
        ValueError: an operation has a handler already.
    """

    def register(handler: Handler) -> Handler:
        if twice := HANDLERS.keys() & set(names):
            raise ValueError(f"{sorted(twice)}: lowered twice")
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def lower(builder: Builder, op: Operation) -> None:
    """Turn an operation into a value or a node, or else into a call of torch."""
    handler = HANDLERS.get(op.name)
    if handler is None or not handler(builder, op):
        call(builder, op)


def call(builder: Builder, op: Operation) -> None:
    """Let torch run an operation on views of memory."""
    args, kwargs = _operands(builder, (op.args, op.kwargs))
    for out in op.outs:
        builder.values[out.storage] = Stored(builder.buffer(out.span, out.dtype))
    builder.add(TorchCall(_operands(builder, op.outs), op.func, args, kwargs))


def call_into(builder: Builder, op: Operation) -> None:
    """Let torch write a part of a value that is in memory already."""
    args, kwargs = _operands(builder, (op.args, op.kwargs))
    builder.add(TorchCall(_operands(builder, op.outs), op.func, args, kwargs))


def copy_out(builder: Builder, ref: Ref, where: Argument) -> None:
    """Let torch copy a value to an output, contiguous and in its own dtype."""
    out = View(where, 0, ref.size, contiguous(ref.size))
    builder.add(TorchCall([out], torch.ops.aten.clone.default, _operands(builder, (ref,)), {}))


def _operands(builder: Builder, tree: Any) -> Any:
    """Arguments of an operation with tensors where they are constant, and views of memory elsewhere."""

    def operand(leaf: Ref) -> Any:
        constant = builder.constant(leaf)
        if constant is not None:
            return constant
        view = builder.stored(leaf)
        if view.dtype != leaf.dtype:
            raise NotLowerable(f"a call of torch on {leaf.dtype} that is held in {view.dtype}")
        return view

    return mapped(Ref, operand, tree)


def argument(op: Operation, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return op.args[index] if index < len(op.args) else op.kwargs.get(name, default)


def image_pixels(builder: Builder, ref: Ref, channel_dim: int, moved: bool = False) -> Pixels | None:
    """A tensor as images; one with the channels elsewhere is copied into that layout first.

    Args:
        builder: knows where it is.
        ref: the tensor.
        channel_dim: its dimension that becomes the channels.
        moved: whether its values are only moved, so that what was rounded has to be; see :func:`origin`.
    """
    if ref.dtype not in builder.target.floats:
        return None
    value = builder.values.get(ref.storage)
    if isinstance(value, Expression):
        seen = origin(builder, ref, moved=moved).simple()
        direct = None if seen is None or seen.storage == ref.storage else pixels_of(seen, channel_dim)
        if direct is not None and builder.constant(direct.ref) is None and builder.readable(direct.ref):
            return direct
    pixels = pixels_of(ref, channel_dim)
    if pixels is not None and (builder.inside(ref) or ref.dtype == torch.float32):
        return pixels
    if len(ref.size) > 4:
        return None
    if ref not in builder.copies:
        builder.copies[ref] = _rearranged(builder, ref, channel_dim % len(ref.size))
    return builder.copies[ref]


def _rearranged(builder: Builder, ref: Ref, channel_dim: int) -> Pixels:
    dims = [0, *(d for d in range(1, len(ref.size)) if d != channel_dim), channel_dim]
    stride, step = [0] * len(ref.size), 1
    for d in reversed(dims):
        stride[d], step = step, step * ref.size[d]
    buffer = builder.buffer(ref.numel, ref.dtype)
    builder.expression(Leaf(ref), View(buffer, 0, ref.size, tuple(stride)))
    new = Ref(id(buffer), 0, ref.size, tuple(stride), ref.dtype)
    builder.values[new.storage] = Stored(buffer)
    pixels = pixels_of(new, channel_dim)
    if pixels is None:
        raise NotLowerable(f"a tensor of {len(ref.size)} dimensions as images")
    return pixels


def pending(builder: Builder, ref: Ref) -> Convolved | None:
    """The convolution that a reference is the only use of, where it was not computed yet."""
    value = builder.values.get(ref.storage)
    if isinstance(value, Convolved) and same_view(value.pixels.ref, ref) and builder.uses[ref.storage] == 1:
        return value
    return None
