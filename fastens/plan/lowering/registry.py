"""From a recording to steps: one handler per operation, which leaves to a later step what that can compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.values import (
    Convolved,
    Expression,
    Leaf,
    Pixels,
    Stored,
    pixels_of,
)
from fastens.plan.lowering.views import origin
from fastens.plan.memory import At, address_unit
from fastens.plan.torch_call import Call
from fastens.trace.functionalize import contiguous
from fastens.trace.record import Node, NotLowerable, Ref, mapped, same_view

Handler = Callable[[Emitter, Node], bool]
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


def lower(emitter: Emitter, node: Node) -> None:
    """Turn an operation into a value or a step, or else into a call of torch."""
    handler = HANDLERS.get(node.name)
    if handler is None or not handler(emitter, node):
        call(emitter, node)


def call(emitter: Emitter, node: Node) -> None:
    """Let torch run an operation on views of the arena and of the inputs."""
    places = {ref: emitter.stored(ref) for ref in node.reads if emitter.constant(ref) is None}
    for out in node.outs:
        size = address_unit(out.dtype)
        place = At(emitter.buffer(out.span, out.dtype))
        emitter.values[out.storage] = Stored(place, size)
        places[out] = place.plus(out.offset, size)
    emitter.add(Call(node.func, node.args, node.kwargs, node.outs, places))


def call_into(emitter: Emitter, node: Node) -> None:
    """Let torch write a part of a value that is in memory already."""
    places = {ref: emitter.stored(ref) for ref in (*node.reads, *node.outs) if emitter.constant(ref) is None}
    emitter.add(Call(node.func, node.args, node.kwargs, node.outs, places))


def copy_out(emitter: Emitter, ref: Ref, place: At) -> None:
    """Let torch copy a value to a place of its own, contiguous and in its own dtype."""
    out = Ref(id(place), 0, ref.size, contiguous(ref.size), ref.dtype)
    places = {out: place} if emitter.constant(ref) is not None else {out: place, ref: emitter.stored(ref)}
    emitter.add(Call(torch.ops.aten.clone.default, (ref,), {}, [out], places))


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def image_pixels(emitter: Emitter, ref: Ref, channel_dim: int) -> Pixels | None:
    """A tensor as images; one with the channels elsewhere is copied into that layout first."""
    if ref.dtype not in emitter.floats:
        return None
    value = emitter.values.get(ref.storage)
    if isinstance(value, Expression):
        seen = origin(emitter, ref).simple()
        direct = None if seen is None or seen.storage == ref.storage else pixels_of(seen, channel_dim)
        if direct is not None and emitter.constant(direct.ref) is None and emitter.is_wide(direct.ref):
            return direct
    pixels = pixels_of(ref, channel_dim)
    inside = not (isinstance(value, Stored) and isinstance(value.at.where, int))
    if pixels is not None and (inside or ref.dtype == torch.float32):
        return pixels
    if len(ref.size) > 4:
        return None
    if ref not in emitter.copies:
        emitter.copies[ref] = _rearranged(emitter, ref, channel_dim % len(ref.size))
    return emitter.copies[ref]


def _rearranged(emitter: Emitter, ref: Ref, channel_dim: int) -> Pixels:
    dims = [0, *(d for d in range(1, len(ref.size)) if d != channel_dim), channel_dim]
    stride, step = [0] * len(ref.size), 1
    for d in reversed(dims):
        stride[d], step = step, step * ref.size[d]
    buffer = emitter.buffer(ref.numel, ref.dtype)
    emitter.expression(Leaf(ref), ref.size, At(buffer), tuple(stride), 0)
    new = Ref(id(buffer), 0, ref.size, tuple(stride), torch.float32)
    emitter.values[new.storage] = Stored(At(buffer))
    pixels = pixels_of(new, channel_dim)
    if pixels is None:
        raise NotLowerable(f"a tensor of {len(ref.size)} dimensions as images")
    return pixels


def pending(emitter: Emitter, ref: Ref) -> Convolved | None:
    """The convolution that a reference is the only use of, where it was not computed yet."""
    value = emitter.values.get(ref.storage)
    if isinstance(value, Convolved) and same_view(value.pixels.ref, ref) and emitter.uses[ref.storage] == 1:
        return value
    return None


def constants_of(emitter: Emitter, tree: Any) -> Any:
    """The arguments of a call with the tensors that are constant in their place."""

    def found(leaf: Ref) -> Any:
        constant = emitter.constant(leaf)
        return leaf if constant is None else constant

    return mapped(Ref, found, tree)
