"""From a recording to steps: one handler per operation, each of which computes nothing that a later step can take over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.plan import steps
from fastens.plan.emit import Call, Emitter, NotLowerable, collect_leaves
from fastens.plan.memory import At
from fastens.plan.record import Node, Ref
from fastens.plan.steps import Activation, Heads, Opcode
from fastens.plan.values import (
    Activated,
    Apply,
    Convolved,
    Enlarged,
    Expression,
    Joined,
    Leaf,
    Normed,
    Padded,
    Pixels,
    Stored,
    pixels_of,
)

Handler = Callable[[Emitter, Node], bool]
HANDLERS: dict[str, Handler] = {}
FLOATS = (torch.float32, torch.bfloat16)


def lowers(*names: str) -> Callable[[Handler], Handler]:
    """Register what lowers operations; it returns False for a form that it does not take."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def lower(emitter: Emitter, node: Node) -> None:
    """Turn an operation into a value or a step, or else into a call of torch."""
    handler = HANDLERS.get(node.name)
    if handler is None or not handler(emitter, node):
        call(emitter, node)


def call(emitter: Emitter, node: Node) -> None:
    """Let torch run an operation on views of the arena."""
    if any(ref.dtype == torch.bfloat16 for ref in (*node.reads, *node.outs)):
        raise NotLowerable(f"{node.name} in bfloat16")  # the arena holds float32
    places = {ref: _in_arena(emitter, ref) for ref in node.reads if emitter.constant(ref) is None}
    for out in node.outs:
        size = out.dtype.itemsize
        span = 1 + sum((n - 1) * s for n, s in zip(out.size, out.stride, strict=True)) if out.numel else 1
        place = At(emitter.buffer(-(-span * size // 4)))
        emitter.values[out.storage] = Stored(place, size)
        places[out] = place.plus(out.offset, size)
    emitter.add(Call(node.func, node.args, node.kwargs, node.outs, places))


def _in_arena(emitter: Emitter, ref: Ref) -> At:
    """Where a value is in the arena; an input is copied there, with the strides that it has."""
    at = emitter.stored(ref)
    if not isinstance(at.where, int):
        return at
    if ref.dtype not in steps.DTYPES:
        raise NotLowerable(f"an input of {ref.dtype}")
    span = 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True)) if ref.numel else 1
    place = At(emitter.buffer(-(-span * ref.dtype.itemsize // 4)))
    emitter.expression(Leaf(ref), ref.size, place, ref.stride, steps.DTYPES[ref.dtype])
    return place


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def image_pixels(emitter: Emitter, ref: Ref, channel_dim: int) -> Pixels | None:
    """A tensor as images; one with the channels elsewhere is copied into that layout first."""
    if ref.dtype not in FLOATS:
        return None
    pixels = pixels_of(ref, channel_dim)
    value = emitter.values.get(ref.storage)
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
    buffer = emitter.buffer(ref.numel)
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
    whole = isinstance(value, Convolved) and same_view(value.pixels.ref, ref)
    return value if whole and emitter.uses[ref.storage] == 1 else None  # pyright: ignore[reportReturnType]


def same_view(a: Ref, b: Ref) -> bool:
    """Whether two references are the same elements in the same order."""
    return a.storage == b.storage and a.offset == b.offset and a.size == b.size and a.stride == b.stride


# Convolutions and linear layers


@lowers("fastens.conv")
def conv(emitter: Emitter, node: Node) -> bool:
    """A member-batched convolution in two dimensions."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    stack = emitter.constant(weight)
    plain = stack is not None and stack.ndim == 5 and not transposed and groups == 1 and set(dilation) == {1}
    if not plain or argument(node, 9, "offsets") is not None or len(x.size) != 4:
        return False
    pixels = image_pixels(emitter, x, 1)
    out = pixels_of(node.outs[0], 1)
    if pixels is None or out is None or x.size[0] == 0:
        return False
    values = None if bias is None else emitter.constant(bias)
    emitter.values[node.outs[0].storage] = Convolved(
        out, pixels, stack, values, ("conv", weight, bias), tuple(stride), tuple(padding)
    )
    return True


@lowers("fastens.linear")
def linear(emitter: Emitter, node: Node) -> bool:
    """A member-batched linear layer: a convolution of 1x1 over tokens."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    stack = emitter.constant(weight)
    if stack is None or argument(node, 3, "offsets") is not None or not x.numel:
        return False
    pixels, out = image_pixels(emitter, x, -1), pixels_of(node.outs[0], -1)
    if pixels is None or out is None:
        return False
    moved = out.reshaped(pixels.height, pixels.width)
    values = None if bias is None else emitter.constant(bias)
    if moved is None or (bias is not None and values is None):
        return False
    emitter.values[node.outs[0].storage] = Convolved(
        moved, pixels, stack[:, :, :, None, None], values, ("linear", weight, bias), (1, 1), (0, 0)
    )
    return True


# Normalisation


@lowers("fastens.group_norm")
def group_norm(emitter: Emitter, node: Node) -> bool:
    """Group normalisation, whose scale and shift a later step applies."""
    x, groups = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if argument(node, 5, "offsets") is not None or not x.numel:
        return False
    pixels, out = image_pixels(emitter, x, 1), pixels_of(node.outs[0], 1)
    if pixels is None or out is None:
        return False
    stacks = [None if ref is None else emitter.constant(ref) for ref in (weight, bias)]
    if any(ref is not None and stack is None for ref, stack in zip((weight, bias), stacks, strict=True)):
        return False
    places = [None if s is None else emitter.kept(s, ("norm", r)) for s, r in zip(stacks, (weight, bias), strict=True)]
    eps = float(argument(node, 4, "eps", 1e-5))
    emitter.values[node.outs[0].storage] = Normed(out, pixels, groups, eps, emitter.num_members, *places)
    return True


@lowers("fastens.layer_norm", "aten.native_layer_norm")
def layer_norm(emitter: Emitter, node: Node) -> bool:
    """Layer normalisation over the last dimension."""
    x, shape = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    whole = node.name == "fastens.layer_norm"
    if len(shape) != 1 or not x.numel or (whole and argument(node, 5, "offsets") is not None):
        return False
    if not whole and (weight is not None or bias is not None or any(emitter.uses[o.storage] for o in node.outs[1:])):
        return False
    pixels, out = image_pixels(emitter, x, -1), pixels_of(node.outs[0], -1)
    if pixels is None or out is None or pixels.step is None or out.step is None:
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
        out.rows // emitter.num_members,
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
        tasks=out.rows,
    )
    emitter.add(step)
    emitter.values[out.ref.storage] = Stored(buffer)
    return True


# Attention


@lowers("aten._scaled_dot_product_flash_attention_for_cpu")
def attention(emitter: Emitter, node: Node) -> bool:
    """Attention without mask, heads in dimension 1."""
    q, k, v = node.args[:3]
    masked = argument(node, 5, "attn_mask") is not None or argument(node, 4, "is_causal", False)
    out = node.outs[0]
    if masked or any(len(r.size) != 4 or r.stride[3] != 1 or r.dtype not in FLOATS for r in (q, k, v, out)):
        return False
    if emitter.uses[node.outs[1].storage] or not out.numel:
        return False
    heads = []
    for ref in (q, k, v):
        if emitter.constant(ref) is not None or not emitter.is_wide(ref):
            return False
        heads.append(Heads(emitter.stored(ref), ref.stride[0], ref.stride[1], ref.stride[2]))  # pyright: ignore[reportArgumentType]
    place = At(emitter.buffer(1 + sum((n - 1) * s for n, s in zip(out.size, out.stride, strict=True))))
    emitter.values[out.storage] = Stored(place)
    rows, count, queries, width = q.size
    chunk = queries if rows * count >= 4 * emitter.num_threads else max(16, -(-queries // 4))
    scale = argument(node, 6, "scale")
    emitter.add(
        steps.Attention(
            rows,
            count,
            queries,
            k.size[2],
            width,
            v.size[3],
            chunk,
            *heads,
            Heads(place, out.stride[0], out.stride[1], out.stride[2]),  # pyright: ignore[reportArgumentType]
            float(width**-0.5 if scale is None else scale),
            tasks=rows * count * -(-queries // chunk),
        )
    )
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
    place = At(emitter.buffer(1 + sum((n - 1) * s for n, s in zip(out.size, out.stride, strict=True))))
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
    activation = _IN_STEP.get(opcode)
    if activation is not None and x.dtype in FLOATS:
        before = pending(emitter, x)
        if before is not None and before.activation is Activation.NONE and _relaid(before, out):
            before.activation = activation
            emitter.values[out.storage] = before
            return True
        for dim in (1, -1):
            pixels, result = pixels_of(x, dim), pixels_of(out, dim)
            if pixels is not None and result is not None and emitter.is_wide(x) and len(out.size) > 1:
                emitter.values[out.storage] = Activated(result, pixels, activation)
                return True
    return express(emitter, out, opcode, (x,))


def _relaid(before: Convolved, out: Ref) -> bool:
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
    if out.dtype not in FLOATS:
        return False
    if not isinstance(b, Ref):
        return _with_number(emitter, out, opcode, a, float(b))
    if not isinstance(a, Ref):
        return False
    for x, other in ((a, b), (b, a)):
        if opcode is Opcode.ADD and _added(emitter, out, x, other):
            return True
        if opcode in (Opcode.ADD, Opcode.MULTIPLY) and _modulated(emitter, out, opcode, x, other):
            return True
    return express(emitter, out, opcode, (a, b))


def _with_number(emitter: Emitter, out: Ref, opcode: Opcode, x: Ref, number: float) -> bool:
    if opcode is Opcode.SUBTRACT:
        opcode, number = Opcode.ADD, -number
    if opcode is Opcode.DIVIDE:
        if number == 0:
            return False
        opcode, number = Opcode.MULTIPLY, 1 / number
    if opcode is Opcode.MULTIPLY:
        if number == 1.0 and x.size == out.size and x.stride == out.stride:
            value = emitter.values.get(x.storage)
            if value is not None and emitter.uses[x.storage] == 1 and x.offset == 0 and _moved(value, x, out):
                emitter.values[out.storage] = value
                return True
        before = pending(emitter, x)
        if before is not None and before.activation is Activation.NONE and _relaid(before, out):
            before.scale *= number
            emitter.values[out.storage] = before
            return True
    numbered = Opcode.ADD_NUMBER if opcode is Opcode.ADD else Opcode.MULTIPLY_NUMBER
    return express(emitter, out, numbered, (x,), number)


def _moved(value: Any, x: Ref, out: Ref) -> bool:
    return isinstance(value, Convolved) and same_view(value.pixels.ref, x) and _relaid(value, out)


def row_vector(emitter: Emitter, ref: Ref, out: Ref) -> tuple[At, int] | None:
    """Place and row stride of a tensor with one value per row and channel, [R, C, 1, 1]; none where it is not."""
    if len(out.size) != 4 or ref.size != (out.size[0], out.size[1], 1, 1) or ref.dtype not in FLOATS:
        return None
    if emitter.constant(ref) is not None:
        at, stride, _ = emitter.operand(ref)
        return (at, stride[0]) if stride[1] == 1 or ref.size[1] == 1 else None
    if (ref.stride[1] != 1 and ref.size[1] != 1) or not emitter.is_wide(ref):
        return None
    return emitter.stored(ref), ref.stride[0]


def _added(emitter: Emitter, out: Ref, x: Ref, other: Ref) -> bool:
    before = pending(emitter, x)
    if before is None or before.scale != 1.0 or before.activation is not Activation.NONE or x.size != out.size:
        return False
    if before.row_vector is None and before.residual is None:
        vector = row_vector(emitter, other, out)
        if vector is not None and _relaid(before, out):
            before.row_vector = vector
            emitter.values[out.storage] = before
            return True
    if before.residual is not None or other.size != out.size or other.dtype not in FLOATS:
        return False
    if x.storage == other.storage:
        return False
    pixels = pixels_of(other, 1 if len(out.size) == 4 else -1)
    if pixels is None or (emitter.constant(other) is None and not emitter.is_wide(other)):
        return False
    residual = pixels.reshaped(before.pixels.height, before.pixels.width)
    if residual is None or not _relaid(before, out):
        return False
    if emitter.constant(other) is None:
        emitter.stored(other)
    before.residual = residual
    emitter.values[out.storage] = before
    return True


def _modulated(emitter: Emitter, out: Ref, opcode: Opcode, x: Ref, other: Ref) -> bool:
    """Scale and shift by row: norm (1 + scale) + shift."""
    value = emitter.values.get(x.storage)
    if not isinstance(value, Normed) or value.tables is not None or emitter.uses[x.storage] != 1:
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
        plus_one = isinstance(root, Apply) and root.opcode is Opcode.ADD_NUMBER and root.number == 1.0
        if value.row_scale is not None or not plus_one or not isinstance(root.operands[0], Leaf):
            return False
        vector = row_vector(emitter, root.operands[0].ref, out)
        if vector is None:
            return False
        value.row_scale = vector
    emitter.values[out.storage] = dataclasses.replace(value, pixels=result)
    return True


def express(emitter: Emitter, out: Ref, opcode: Opcode, operands: tuple[Ref, ...], number: float = 0.0) -> bool:
    """Keep an elementwise operation as an expression, joined with those that it is the only use of."""
    if out.dtype not in FLOATS or any(ref.dtype not in FLOATS for ref in operands):
        return False
    roots: list[Leaf | Apply] = []
    for ref in operands:
        value = emitter.values.get(ref.storage)
        inline = isinstance(value, Expression) and same_view(value.ref, ref) and emitter.uses[ref.storage] == 1
        joined = value.root if inline and ref.size == out.size else Leaf(ref)  # pyright: ignore[reportOptionalMemberAccess]
        roots.append(joined)
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


@lowers("aten.reciprocal", "aten.pow", "aten.neg")
def power(emitter: Emitter, node: Node) -> bool:
    """Powers that have an instruction."""
    x, out = node.args[0], node.outs[0]
    if node.name == "aten.reciprocal":
        return express(emitter, out, Opcode.NUMBER_OVER, (x,), 1.0)
    if node.name == "aten.neg":
        return express(emitter, out, Opcode.MULTIPLY_NUMBER, (x,), -1.0)
    opcode = {2.0: Opcode.SQUARE, 0.5: Opcode.SQRT}.get(node.args[1] if isinstance(node.args[1], int | float) else None)
    return isinstance(x, Ref) and opcode is not None and express(emitter, out, opcode, (x,))


@lowers("aten._to_copy", "aten.clone", "aten.alias_copy", "aten.contiguous")
def copy(emitter: Emitter, node: Node) -> bool:
    """A copy in another layout or dtype."""
    x, out = node.args[0], node.outs[0]
    if out.dtype not in FLOATS or x.dtype not in steps.DTYPES:
        return False
    value = emitter.values.get(x.storage)
    if isinstance(value, Expression) and same_view(value.ref, x) and emitter.uses[x.storage] == 1:
        emitter.values[out.storage] = Expression(out, value.root)
    else:
        emitter.values[out.storage] = Expression(out, Leaf(x))
    return True


@lowers("aten.repeat")
def repeat(emitter: Emitter, node: Node) -> bool:
    """Copies along the first dimension, of any dtype."""
    x, times = node.args[:2]
    out = node.outs[0]
    if out.dtype not in steps.DTYPES or len(times) != len(x.size) or any(n != 1 for n in times[1:]):
        return False
    at, stride, code = emitter.operand(x)
    size = 4 if out.dtype in FLOATS else out.dtype.itemsize
    place = At(emitter.buffer(-(-out.numel * size // 4)))
    out_code = 0 if out.dtype in FLOATS else code
    sizes, out_stride = [times[0], *x.size], [x.size[0] * out.stride[0], *out.stride]
    source = steps.Strided(at, code, [0, *(0 if n == 1 else s for n, s in zip(x.size, stride, strict=True))])  # pyright: ignore[reportArgumentType]
    emitter.pointwise(sizes, steps.Strided(place, out_code, out_stride), [source], [(Opcode.COPY, 0, 0, 0.0)])  # pyright: ignore[reportArgumentType]
    emitter.values[out.storage] = Stored(place, size)
    return True


@lowers("aten.copy_")
def partial_copy(emitter: Emitter, node: Node) -> bool:
    """A copy into a part of a value, or in place of a whole one."""
    out, x = node.args[:2]
    if x.dtype not in FLOATS or out.dtype not in FLOATS:
        return False
    if not same_view(out, node.outs[0]) or emitter.values.get(out.storage) is None:  # the whole: renamed
        emitter.values[node.outs[0].storage] = Expression(node.outs[0], Leaf(x))
        return True
    for storage in list(emitter.values):  # whatever still waits may read what is overwritten here
        emitter.store(storage)
    emitter.expression(Leaf(x), out.size, emitter.stored(out), out.stride, 0)
    return True


@lowers("aten.new_empty", "aten.empty_like", "aten.new_empty_strided")
def empty(emitter: Emitter, node: Node) -> bool:
    """Memory that is written later."""
    out = node.outs[0]
    if out.dtype not in FLOATS:
        return False
    emitter.values[out.storage] = Stored(At(emitter.buffer(out.numel)))
    return True


def versioned(nodes: list[Node], outputs: list[Ref]) -> tuple[list[Node], list[Ref]]:
    """Give the result of an operation in place a storage of its own, so that every value is written once.

    Raises:
        NotLowerable: only part of a storage is overwritten.
    """
    current: dict[int, int] = {}
    whole: dict[int, Ref] = {}
    fresh = -1

    def renamed(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        return dataclasses.replace(leaf, storage=current.get(leaf.storage, leaf.storage))

    result = []
    for node in nodes:
        args, kwargs = pytree.tree_map(renamed, (node.args, node.kwargs))
        for written in node.writes:
            made = whole.get(written.storage)
            if node.name == "aten.copy_" and made is not None and not same_view(made, written):
                continue  # a part: the value stays where it is, see partial_copy
            if made is None or not same_view(made, written) or node.outs != [written]:
                raise NotLowerable(f"{node.name} of a part of a tensor")
            current[written.storage] = fresh
            fresh -= 1
        if not node.writes:
            whole.update((out.storage, out) for out in node.outs)
        outs = [renamed(out) for out in node.outs]  # of a partial copy: the part
        result.append(dataclasses.replace(node, args=args, kwargs=kwargs, outs=outs, writes=[]))
    return result, [renamed(out) for out in outputs]


def constants_of(emitter: Emitter, tree: Any) -> Any:
    """The arguments of a call with the tensors that are constant in their place."""

    def found(leaf: Any) -> Any:
        constant = emitter.constant(leaf) if isinstance(leaf, Ref) else None
        return leaf if constant is None else constant

    return pytree.tree_map(found, tree)


__all__ = ["HANDLERS", "Tensor", "constants_of", "lower", "lowers", "versioned"]
