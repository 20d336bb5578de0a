"""Derivatives of a recorded pass along a direction: every operation again, beside what it does to a tangent.

For ``y = f(x)`` and a tangent ``x'`` each operation adds its own ``f'(x) x'`` (forward mode, exact). Run under a
recording of its own, this makes a program that gives both, in one pass and without a graph to go back through.
Normalisations and softmax have symmetric derivatives, so that the library's backward functions serve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.trace.functionalize import functionalized
from fastens.trace.record import NotLowerable, NotRecordable, Operation, Recording, Ref

aten = torch.ops.aten
# What an operation does to a tangent: the operation, its arguments, the tangents of those (none where they have none),
# and its results.
Rule = Callable[[Operation, list[Any], list[Any], list[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Derivative:
    """A rule, and what of an operation it knows.

    Attributes:
        rule: what the operation does to tangents.
        moved: how many of the first arguments may have one.
        settings: keyword arguments that the rule reads.
    """

    rule: Rule
    moved: int
    settings: frozenset[str]

    def check(self, op: Operation, tangents: list[Any], named: dict[str, Any]) -> None:
        """Raise where an argument counts that the rule does not read.

        Args:
            op: the operation.
            tangents: of its arguments.
            named: of its keyword arguments.

        Raises:
            NotRecordable: the derivative of this form is not known.
        """
        unread = [name for name, value in op.kwargs.items() if value is not None and name not in self.settings]
        beyond = [x for x in pytree.tree_leaves((tangents[self.moved :], named)) if x is not None]
        if unread or beyond:
            raise NotRecordable(f"the derivative of {op.name} in this form is not known here")


RULES: dict[str, Derivative] = {}
# Operations that are linear in their first argument, and have no other tensor.
LINEAR = (
    *("repeat", "clone", "_to_copy", "alias_copy", "neg", "avg_pool2d", "mean", "sum"),
    *("upsample_nearest1d", "upsample_nearest2d", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d"),
)

_OF_KIND = "dtype layout device pin_memory non_blocking memory_format"  # what their settings are

# Operations that read of a tensor only what kind it is.
EMPTY = {"aten.new_empty", "aten.empty_like", "aten.new_empty_strided"}
FILLED = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
CREATED = EMPTY | {f"aten.{name}" for name in FILLED}


def along(recording: Recording, inputs: list[Tensor], tangent: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Run a recorded pass, and its derivative along a tangent of one input.

    Args:
        recording: of the pass.
        inputs: the tensors that it was recorded with, or others laid out as they are.
        tangent: of an input, in its shape.
        number: of that input.

    Returns:
        The first output of the pass and its derivative.

    Raises:
        NotRecordable: an operation whose derivative is not known here.
    """
    values = {ref.storage: _from_start(x, ref) for ref, x in zip(recording.inputs, inputs, strict=True)}
    tangents = {recording.inputs[number].storage: _laid_out(tangent, recording.inputs[number], inputs[number])}

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        return _view(values[leaf.storage], leaf) if leaf.storage in values else recording.constant(leaf)

    def derivative(leaf: Any) -> Any:
        found = tangents.get(leaf.storage) if isinstance(leaf, Ref) else None
        return None if found is None else _view(found, leaf)

    try:
        operations, outputs = functionalized(recording.operations, recording.outputs, recording.inputs)
    except NotLowerable as error:
        raise NotRecordable(str(error)) from error
    unwritten: set[int] = set()  # storages that hold nothing yet
    for op in operations:
        args, kwargs = pytree.tree_map(value, (list(op.args), op.kwargs))
        of_args, named = pytree.tree_map(derivative, (list(op.args), op.kwargs))
        if op.name == "aten.copy_":
            _copied(op, args, of_args[1] if _is_continuous(args[0]) else None, values, tangents, unwritten)
            continue
        moves = any(ref.storage in tangents for ref in op.reads)
        op = dataclasses.replace(op, func=_out_of_place(op), kwargs=kwargs)
        results = [r for r in pytree.tree_leaves(op.func(*args, **kwargs)) if isinstance(r, Tensor)]
        for out, result in zip(op.outs, results, strict=True):
            if not _as_recorded(result, out):
                raise NotRecordable(f"{op.name} gave another layout than when it was recorded")
            values[out.storage] = result
        if op.name in CREATED:
            unwritten.update(out.storage for out in op.outs if op.name in EMPTY)
        elif moves and any(map(_is_continuous, results)):
            known = RULES.get(op.name)
            if known is None:
                raise NotRecordable(f"the derivative of {op.name} is not known here")
            known.check(op, of_args, named)
            moved = known.rule(op, args, of_args, results)
            tangents[op.outs[0].storage] = _laid_out(moved, op.outs[0], results[0])
    first = outputs[0]
    if first.storage not in tangents:
        raise NotRecordable("the output does not depend on the batch")
    return value(first), derivative(first)


def _copied(
    op: Operation,
    args: list[Any],
    moved: Tensor | None,
    values: dict[int, Tensor],
    tangents: dict[int, Tensor],
    unwritten: set[int],
) -> None:
    """A copy in place of a whole value, or into a part of one; the tangent is copied to the same place."""
    into, out = op.args[0], op.outs[0]
    base = values[into.storage]
    if out.storage != into.storage:  # the whole, under another name
        values[out.storage] = torch.empty_like(base).copy_(args[1])
        if moved is not None:
            tangents[out.storage] = torch.empty_like(base).copy_(moved)
        return
    if moved is not None and into.storage not in tangents:
        tangents[into.storage] = torch.empty_like(base) if into.storage in unwritten else torch.zeros_like(base)
    if into.storage in tangents:
        part = _view(tangents[into.storage], into)
        part.copy_(torch.zeros((), dtype=base.dtype) if moved is None else moved)
    args[0].copy_(args[1])
    unwritten.discard(into.storage)


def _is_continuous(x: Tensor) -> bool:
    """Whether it has derivatives: integers and truth values have none."""
    return x.is_floating_point() or x.is_complex()


def _out_of_place(op: Operation) -> Any:
    """The operation, in the form that writes to memory of its own."""
    if not op.func._schema.is_mutable:
        return op.func
    name = op.name.removeprefix("aten.")
    plain = getattr(aten, name.rstrip("_"), None)
    if plain is None or op.func._overloadname not in plain.overloads():
        raise NotRecordable(f"{op.name} writes to a part of a tensor, which has no derivative here")
    return getattr(plain, op.func._overloadname)


def _from_start(x: Tensor, ref: Ref) -> Tensor:
    if x.storage_offset() != ref.offset:
        raise NotRecordable("an input is another part of its storage than when it was recorded")
    return x


def _as_recorded(x: Tensor, ref: Ref) -> bool:
    """Whether the elements of ``x`` are where those of ``ref`` were."""
    pairs = zip(ref.size, x.stride(), ref.stride, strict=True)
    return x.storage_offset() == ref.offset and all(size == 1 or a == b for size, a, b in pairs)


def _view(base: Tensor, ref: Ref) -> Tensor:
    if ref.size == tuple(base.shape) and _as_recorded(base, ref):
        return base
    return base.as_strided(ref.size, ref.stride, ref.offset)


def _laid_out(moved: Tensor, ref: Ref, like: Tensor) -> Tensor:
    """A tangent where its value is: the same view of a storage, so that views of the one are views of the other."""
    if moved.shape != ref.size:
        moved = moved.expand(ref.size)
    if _as_recorded(moved, ref):
        return moved
    if ref.offset:
        raise NotRecordable("a value that does not begin its storage")
    return torch.empty_like(like).copy_(moved)


def differentiates(*names: str, moved: int = 1, settings: str = "") -> Callable[[Rule], Rule]:
    """Register what operations do to tangents of the first arguments; ``settings`` are keywords that it reads."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, Derivative(rule, moved, frozenset(settings.split()))))
        return rule

    return register


def _plain(op: Operation, settings: list[Any], allowed: tuple[Any, ...] = (None, "none", 0)) -> None:
    if any(isinstance(setting, Tensor) or setting not in allowed for setting in settings):
        raise NotRecordable(f"the derivative of {op.name} in this form is not known here")


@differentiates(*(f"aten.{name}" for name in LINEAR), settings=_OF_KIND)
def _linear_operation(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    return op.func(moved[0], *args[1:], **op.kwargs)


@differentiates("fastens.conv")
def _conv(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    return torch.ops.fastens.conv(moved[0], args[1], None, *args[3:])


@differentiates("aten.convolution")
def _library_conv(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    return op.func(moved[0], args[1], None, *args[3:])


@differentiates("fastens.linear")
def _linear(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    _plain(op, args[3:])
    return torch.ops.fastens.linear(moved[0], args[1])


@differentiates("fastens.group_norm")
def _group_norm(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    x, groups, weight, _, eps, *rest = args
    _plain(op, rest)
    size = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
    tangent = moved[0]
    if x.ndim != 4:  # tokens seen with their channels first
        x, tangent = x.contiguous(), tangent.contiguous()
    _, mean, rstd = aten.native_group_norm(x, None, None, *size, eps)
    y = aten.native_group_norm_backward(tangent, x, mean, rstd, None, *size, [True, False, False])[0]
    return y if weight is None else y * _rows(weight, x).view(x.shape[0], x.shape[1], *(1,) * (x.ndim - 2))


@differentiates("fastens.layer_norm")
def _layer_norm(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    x, shape, weight, _, eps, *rest = args
    _plain(op, rest)
    y = _normalised(x, shape, eps, moved[0])
    return y if weight is None else y * _rows(weight, x).view(x.shape[0], *(1,) * (x.ndim - 1 - len(shape)), *shape)


@differentiates("aten.native_layer_norm")
def _native_layer_norm(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    x, shape, weight, _, eps = args
    y = _normalised(x, shape, eps, moved[0])
    return y if weight is None else y * weight


@differentiates("fastens.batch_norm")
def _batch_norm(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    _, mean, variance, weight, _, *rest = args
    return torch.ops.fastens.batch_norm(moved[0], torch.zeros_like(mean), variance, weight, None, *rest)


@differentiates("fastens.rms_norm")
def _rms_norm(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    x, shape, weight, eps, *rest = args
    _plain(op, rest)
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = scale * (moved[0] - x * scale.square() * (x * moved[0]).mean(dims, keepdim=True))
    return y if weight is None else y * _rows(weight, x).view(x.shape[0], *(1,) * (x.ndim - 1 - len(shape)), *shape)


def _normalised(x: Tensor, shape: Any, eps: float, moved: Tensor) -> Tensor:
    _, mean, rstd = aten.native_layer_norm(x, shape, None, None, eps)
    return aten.native_layer_norm_backward(moved, x, shape, mean, rstd, None, None, [True, False, False])[0]


def _rows(stack: Tensor, x: Tensor) -> Tensor:
    """Parameters of the members, [K, ...], for each of the rows of ``x``."""
    return stack.repeat_interleave(x.shape[0] // len(stack), 0)


@differentiates("aten.silu", "aten.gelu", settings="approximate")
def _activation(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    backward = aten.silu_backward if op.name == "aten.silu" else aten.gelu_backward
    return backward(moved[0], args[0], **op.kwargs)


@differentiates("aten.sigmoid", "aten.tanh", "aten.exp", "aten.relu")
def _of_result(op: Operation, _: list[Any], moved: list[Any], results: list[Tensor]) -> Tensor:
    y = results[0]
    if op.name == "aten.exp":
        return moved[0] * y
    if op.name == "aten.relu":
        return aten.threshold_backward(moved[0], y, 0)
    return (aten.sigmoid_backward if op.name == "aten.sigmoid" else aten.tanh_backward)(moved[0], y)


@differentiates("aten.pow", "aten.sqrt", "aten.rsqrt", "aten.reciprocal", "aten.sin", "aten.cos", "aten.log")
def _of_input(op: Operation, args: list[Any], moved: list[Any], results: list[Tensor]) -> Tensor:
    x, y = args[0], results[0]
    if op.name == "aten.pow":
        if not isinstance(args[1], int | float):
            raise NotRecordable("the derivative of aten.pow in this form is not known here")
        return moved[0] * (args[1] * (x if args[1] == 2 else x.pow(args[1] - 1 if args[1] else 0)))
    slopes: dict[str, Callable[[], Tensor]] = {
        "aten.sqrt": lambda: 0.5 / y,
        "aten.rsqrt": lambda: -0.5 * y / x,
        "aten.reciprocal": lambda: -y * y,
        "aten.sin": x.cos,
        "aten.cos": lambda: -x.sin(),
        "aten.log": x.reciprocal,
    }
    return moved[0] * slopes[op.name]()


@differentiates("aten._softmax")
def _softmax(op: Operation, args: list[Any], moved: list[Any], results: list[Tensor]) -> Tensor:
    return aten._softmax_backward_data(moved[0], results[0], args[1], args[0].dtype)


@differentiates("aten.add", "aten.sub", moved=2, settings="alpha")
def _sum(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    a, b = moved[:2]
    factor = op.kwargs.get("alpha", 1) * (1 if op.name == "aten.add" else -1)
    if b is None:
        return a
    scaled = b if factor == 1 else b * factor
    return scaled if a is None else a + scaled


@differentiates("aten.mul", "aten.bmm", "aten.mm", moved=2)
def _product(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    a, b = moved[:2]
    parts = [op.func(a, args[1])] if a is not None else []
    parts += [op.func(args[0], b)] if b is not None else []
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


@differentiates("aten.div", moved=2)
def _quotient(op: Operation, args: list[Any], moved: list[Any], results: list[Tensor]) -> Tensor:
    if moved[1] is None:
        return moved[0] / args[1]
    change = results[0] * moved[1] if moved[0] is None else results[0] * moved[1] - moved[0]
    return -change / args[1]


@differentiates("aten.cat")
def _cat(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    parts = [torch.zeros_like(x) if m is None else m for x, m in zip(args[0], moved[0], strict=True)]
    return op.func(parts, *args[1:], **op.kwargs)


@differentiates("aten._scaled_dot_product_flash_attention_for_cpu", moved=3, settings="attn_mask scale")
def _attention(op: Operation, args: list[Any], moved: list[Any], _: list[Tensor]) -> Tensor:
    _plain(op, args[3:], (0.0, False))
    q, k, v = args[:3]
    scale = op.kwargs.get("scale") or q.shape[-1] ** -0.5
    scores, mask = scale * q @ k.transpose(-1, -2), op.kwargs.get("attn_mask")
    share = (scores if mask is None else scores + mask).softmax(-1)
    terms = [
        scale * left @ right.transpose(-1, -2)
        for left, right in ((moved[0], k), (q, moved[1]))
        if left is not None and right is not None
    ]
    parts = [] if moved[2] is None else [share @ moved[2]]
    if terms:
        slope = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        parts.append(aten._softmax_backward_data(slope, share, -1, share.dtype) @ v)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
