"""Lowering of attention: torch's own, and softmax(q k^T) v as networks write it with two products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastens.plan.graph import Attention, View
from fastens.plan.layout import Factors
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.origin import Origin, origin
from fastens.plan.lowering.registry import argument, call, lowers
from fastens.plan.lowering.values import Expression, Leaf, Scores, Stored, is_rounded
from fastens.trace.record import Operation, Ref

_MOST_WIDTH = 512  # of a head: beyond it, its keys and values leave the second-level cache


@lowers(*(f"aten._scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
        "aten._scaled_dot_product_flash_attention_for_cpu")  # fmt: skip
def attention(builder: Builder, op: Operation) -> bool:
    """Attention without mask, heads in dimension 1; the libraries' variants have their arguments in different order.

    Where several heads of queries share one of keys and values, each of those is a node.
    """
    q, k, v = op.args[:3]
    named = {**dict(zip((a.name for a in op.func._schema.arguments), op.args, strict=False)), **op.kwargs}
    masked = any(named.get(name) is not None for name in ("attn_mask", "attn_bias")) or named.get("is_causal", False)
    out = op.outs[0]
    if masked or any(len(r.size) != 4 or r.dtype not in builder.target.floats for r in (q, k, v, out)):
        return False
    if any(builder.uses[other.storage] for other in op.outs[1:]) or not out.numel:
        return False
    groups = k.size[1]
    if (groups != q.size[1] and not builder.target.shared_heads) or groups != v.size[1] or q.size[1] % groups:
        return False
    if any(builder.constant(ref) is not None or not builder.readable(ref) for ref in (q, k, v)):
        return False
    of_q, of_k, of_v = (builder.stored(ref) for ref in (q, k, v))
    builder.values[out.storage] = Stored(builder.buffer(out.span, out.dtype))
    written = builder.stored(out)
    scale = named.get("scale")
    scale = float(q.size[-1] ** -0.5 if scale is None else scale)
    of_each = q.size[1] // groups
    if of_each == 1:
        builder.add(Attention(written, of_q, of_k, of_v, scale))
        return True
    for group in range(groups):
        ours, theirs = (_heads(of, group * of_each, of_each) for of in (written, of_q))
        keys, values = (_repeated(_heads(of, group, 1), of_each) for of in (of_k, of_v))
        builder.add(Attention(ours, theirs, keys, values, scale))
    return True


def _repeated(of: View, count: int) -> View:
    """One head, so many times."""
    return View(of.where, of.offset, (of.size[0], count, *of.size[2:]), (of.stride[0], 0, *of.stride[2:]))


def _heads(of: View, first: int, count: int) -> View:
    """Some of the heads."""
    return View(of.where, of.offset + first * of.stride[1], (of.size[0], count, *of.size[2:]), of.stride)


# Two products with a softmax between them


@lowers("aten.bmm", "aten.baddbmm")
def product(builder: Builder, op: Operation) -> bool:
    """Products of matrices: scores of attention until something else wants them, or weights times values."""
    a, b = op.args[-2:]
    out, scale = op.outs[0], 1.0
    if op.name == "aten.baddbmm":
        if argument(op, 3, "beta", 1) != 0 or len(op.args) != 3:
            return False
        scale = float(op.kwargs.get("alpha", 1))
    if any(r.dtype not in builder.target.floats or builder.constant(r) is not None or not r.numel for r in (a, b)):
        return False
    for weights, values, turned in ((a, b, False), (_transposed(b), _transposed(a), True)):
        found = scores_of(builder, weights)
        same_shape = found is not None and weights.size == (found.q.size[0], found.q.size[1], found.k.size[1])
        if found is not None and found.softmax and same_shape and scale == 1.0:
            if not _attend(builder, found, values, _transposed(out) if turned else out):
                break
            return True
    builder.values[out.storage] = Scores(out, a, _transposed(b), scale, False, lambda: call(builder, op))
    return True


def _transposed(ref: Ref) -> Ref:
    size, stride = ref.size, ref.stride
    return dataclasses.replace(ref, size=(size[0], size[2], size[1]), stride=(stride[0], stride[2], stride[1]))


def scores_of(builder: Builder, ref: Ref) -> Scores | None:
    """The scores, or the weights, that a reference is the whole of, with each query's in a line; none otherwise."""
    value = builder.values.get(ref.storage)
    if not isinstance(value, Scores) or ref.offset != value.ref.offset or ref.numel != value.ref.numel:
        return None
    return value if _in_line(ref) and _in_line(value.ref) else None


def _in_line(ref: Ref) -> bool:
    expected = 1
    for n, stride in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def kept_scores(builder: Builder, x: Ref, out: Ref, number: float, compute: Callable[[], object]) -> bool:
    """Let scores times a number, or copied weights, be scores or weights still; return whether they are.

    Args:
        builder: knows whether they are.
        x: what is copied or multiplied.
        out: the result.
        number: the factor, 1 for a copy.
        compute: makes the result an ordinary value.
    """
    found = scores_of(builder, x)
    if found is None or not _in_line(out) or out.size != x.size or (found.softmax and number != 1.0):
        return False
    if not found.softmax and is_rounded(x, out):
        return False
    scale = found.scale * number
    builder.values[out.storage] = dataclasses.replace(found, ref=out, scale=scale, compute=compute)
    return True


@lowers("aten._softmax")
def softmax(builder: Builder, op: Operation) -> bool:
    """The softmax of scores over the keys."""
    x, dim = op.args[:2]
    out = op.outs[0]
    found = scores_of(builder, x)
    if found is None or found.softmax or dim % len(x.size) != len(x.size) - 1 or x.size[-1] != found.k.size[1]:
        return False
    if not _in_line(out) or out.dtype not in builder.target.floats:
        return False
    compute = lambda: call(builder, op)  # noqa: E731
    builder.values[out.storage] = dataclasses.replace(found, ref=out, softmax=True, compute=compute)
    return True


def _attend(builder: Builder, scores: Scores, values: Ref, out: Ref) -> bool:
    """Emit attention for weights and values [N, K, D], into [N, Q, D]."""
    number, queries, width = scores.q.size
    keys, value_width = scores.k.size[1], values.size[2]
    if max(width, value_width) > _MOST_WIDTH:
        return False
    sources = [origin(builder, ref, scaled=ref is not values) for ref in (scores.q, scores.k, values)]
    count = _common_heads(sources)
    split = [_split(source, count) for source in sources]
    if any(strides is None for strides in split):
        sources = [Origin(ref, [[(n, s)] for n, s in zip(ref.size, ref.stride, strict=True)], 1.0) for ref in
                   (scores.q, scores.k, values)]  # fmt: skip
        count, split = 1, [ref.stride for ref in (scores.q, scores.k, values)]
        split = [(row, 0, token, channel) for row, token, channel in split]
    if any(builder.constant(s.ref) is not None or not builder.readable(s.ref) for s in sources):
        return False
    rows = number // count
    heads = []
    for source, strides, (tokens, each) in zip(
        sources, split, ((queries, width), (keys, width), (keys, value_width)), strict=True
    ):
        view = builder.stored(source.ref)
        heads.append(View(view.where, view.offset, (rows, count, tokens, each), strides or ()))
    # token by token with the heads side by side, as the layer behind reads it; the recorded layout is a copy of that
    place = builder.buffer(rows * queries * count * value_width, scores.ref.dtype)
    stride = (queries * count * value_width, value_width, count * value_width, 1)
    size = (rows, count, queries, value_width)
    made = Ref(id(place), 0, size, stride, scores.ref.dtype)
    builder.values[made.storage] = Stored(place)
    scale = scores.scale * sources[0].scale * sources[1].scale
    of_q, of_k, of_v = heads
    builder.add(Attention(builder.stored(made), of_q, of_k, of_v, scale))
    row, token, channel = out.stride
    recorded = dataclasses.replace(out, size=size, stride=(row * count, row, token, channel))
    builder.values[out.storage] = Expression(recorded, Leaf(made))
    return True


def _common_heads(sources: list[Origin]) -> int:
    """How many heads a row has: what the first dimension of queries, keys and values is made of innermost."""
    inner = [factors[0][0] for factors in (source.dims[0] for source in sources) if len(factors) > 1]
    return inner[0] if inner else 1


def _split(source: Origin, count: int) -> tuple[int, int, int, int] | None:
    """Strides of rows, heads, tokens and channels; none where a dimension has several."""
    outer, *inner = source.dims
    if any(len(factors) > 1 for factors in inner):
        return None
    rows = _rows_and_heads(outer, count)
    if rows is None:
        return None
    token, channel = (factors[0][1] if factors else 0 for factors in inner)
    return *rows, token, channel


def _rows_and_heads(outer: Factors, count: int) -> tuple[int, int] | None:
    if count == 1:
        return (outer[0][1] if outer else 0, 0) if len(outer) < 2 else None
    if not outer:
        return None
    size, stride = outer[0]
    if len(outer) == 1:
        return (stride * count, stride) if size % count == 0 else None
    return (outer[1][1], stride) if len(outer) == 2 and size == count else None
