"""Copies and elementwise nodes that other nodes do on their way, by reading or writing elsewhere."""

from __future__ import annotations

import math

import torch

from fastens.plan.gpu.dataflow import Dataflow, split
from fastens.plan.gpu.launch import Conv, Entry, Join
from fastens.plan.graph import Code, Node, Pointwise, View, factors_through
from fastens.plan.layout import joined
from fastens.plan.loops import in_line
from fastens.plan.memory import HALVES, Argument
from fastens.program.steps import Opcode
from fastens.trace.functionalize import contiguous
from fastens.trace.record import Ref

_MOST_INPUTS, _MOST_INSTRUCTIONS = 8, 16  # of an elementwise node
_CHEAP = 1 << 16  # elements that are computed twice sooner than launched once more
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def copied(node: Node | None) -> Pointwise | None:
    """The node as a copy of one operand; none where it computes or reads more."""
    return node if isinstance(node, Pointwise) and node.is_copy else None


def _rounds(node: Pointwise) -> bool:
    """Whether a node writes half precision of what is not: the network's conversion, which later nodes rely on."""
    return node.out.dtype in HALVES and any(view.dtype != node.out.dtype for view in node.inputs)


def return_what_was_copied(flow: Dataflow) -> None:
    """Return copy(x)  ->  return x, where x seen through the copy is one view."""
    flow.outputs.views = [_original(flow, view, any_dtype=True) for view in flow.outputs.views]


def convolve_what_was_copied(flow: Dataflow) -> None:
    """Convolve copy(x)  ->  convolve x, an input in the layout it is read in; rows that all members share once."""
    for node in flow.nodes:
        if isinstance(node, Conv):
            _read_image(flow, node)


def enter_in_the_dtype_read(flow: Dataflow) -> None:
    """Copy an input to another dtype  ->  copy what has that dtype as it comes in, which is a copy anyway."""
    for node in flow.nodes:
        if copy := copied(node):
            _enter(copy, flow.inputs)


def _enter(copy: Pointwise, inputs: list[Ref]) -> None:
    """Let an input that is copied to another dtype have that dtype as it comes in."""
    out, (source,) = copy.out, copy.inputs
    if not _is_input(source, inputs) or out.dtype not in _FLOATS or out.dtype == source.dtype:
        return
    ref = inputs[source.where.number]
    stride = ref.stride if ref.span == ref.numel else contiguous(ref.size)
    entered = _entered(source, inputs, stride, out.dtype)
    if entered is not None:
        copy.inputs = [entered]


def _original(flow: Dataflow, view: View, any_dtype: bool = False) -> View:
    """A view where it was copied from first, but for what a copy has rounded."""
    dtype = view.dtype
    while (copy := copied(flow.writer(view))) and flow.is_settled(copy):
        (source,) = copy.inputs
        moved = view.through(copy.out, source)
        if moved is None or not (any_dtype or source.dtype == view.dtype):
            break
        if _rounds(copy) and copy.out.dtype != dtype:
            break
        view = moved
    return view


def _is_input(view: View, inputs: list[Ref]) -> bool:
    return isinstance(view.where, Argument) and view.where.number < len(inputs)


def _entered(view: View, inputs: list[Ref], stride: tuple[int, ...], dtype: torch.dtype) -> View | None:
    """A view of an input where that is copied to other strides and another dtype as it comes in."""
    number = view.where.number
    ref = inputs[number]
    entry = Entry(number, ref.size, stride, dtype)
    whole = View(view.where, 0, ref.size, ref.stride)
    return view.through(whole, View(entry, 0, ref.size, stride))


def _read_image(flow: Dataflow, node: Conv) -> None:
    """Let a convolution read an input, or rows that all members share, once."""
    block = node.block
    x, weight, bias = block.x, block.weight, block.bias
    dtype = x.dtype
    offset, dims, where = x.offset, [[(n, s)] if n > 1 else [] for n, s in zip(x.size, x.stride, strict=True)], x.where
    changes = 0
    while (copy := copied(flow.writer(View(where, offset, (), ())))) and flow.is_settled(copy):
        out, (source,) = copy.out, copy.inputs
        flat = [pair for factors in dims for pair in factors]
        view = View(where, offset, tuple(n for n, _ in flat), tuple(s for _, s in flat))
        found = factors_through(view, out, source)
        changes += source.dtype != out.dtype
        if found is None or changes > 1:
            return
        pieces, offset, where = iter(found[1]), found[0], source.where
        dims = [joined([pair for _ in factors for pair in next(pieces)]) for factors in dims]
    rows, *rest = dims
    shared = len(rows) > 0 and rows[-1][1] == 0
    rows = rows[:-1] if shared else rows
    if where == x.where or any(len(factors) > 1 for factors in (rows, *rest)):
        return
    size = (rows[0][0] if rows else 1, *x.size[1:])
    stride = tuple(factors[0][1] if factors else 0 for factors in (rows, *rest))
    view = View(where, offset, size, stride)
    if _is_input(view, flow.inputs):
        view = _image_entered(view, flow.inputs, dtype)
    usable = (
        block.offsets is block.prologue.mask is None and view is not None and view.is_dense() and view.dtype == dtype
    )
    if shared and weight.shape[0] == 1:  # of all rows: a member for each time that they are repeated
        weight = weight.expand(x.size[0] // size[0], *weight.shape[1:])
        bias = None if bias is None else bias.expand(len(weight), -1).contiguous()
    members = weight.shape[0]
    whole = x.size[0] == size[0] * (members if shared else 1)
    plain = block.prologue.moments is None and block.prologue.activation == "none"
    if usable and whole and (plain or not shared):
        node.change(x=view, weight=weight, bias=bias, shared=shared)


def _image_entered(view: View, inputs: list[Ref], dtype: torch.dtype) -> View | None:
    """An image that is an input, with its channels last."""
    rows, channels, height, width = view.size
    last = View(view.where, 0, view.size, (channels * height * width, 1, width * channels, channels))
    ref = inputs[view.where.number]
    moved = View(view.where, 0, ref.size, ref.stride).through(view, last)
    return None if moved is None or rows == 0 else _entered(view, inputs, moved.stride, dtype)


def fuse_elementwise(flow: Dataflow) -> None:
    """f(g(x))  ->  (f g)(x), of elementwise f and g; g is computed again where that is less than to launch it."""
    for node in list(flow.nodes):
        while isinstance(node, Pointwise) and _take_in(flow, node):
            flow.index()
            flow.remove_unread()


def _take_in(flow: Dataflow, node: Pointwise) -> bool:
    out, inputs, code = node.out, node.inputs, node.code
    for i, view in enumerate(inputs):
        before = flow.writer(view)
        if not isinstance(before, Pointwise) or not flow.is_settled(before):
            continue
        their_out, their_inputs, their_code = before.out, before.inputs, before.code
        once = len(flow.readers(view)) == 1
        floats = all(v.dtype in _FLOATS for v in (their_out, *their_inputs))
        same = all(v.dtype == their_out.dtype for v in their_inputs)
        if _rounds(before) or not (same if before.is_copy else floats):
            continue
        if not (once or math.prod(their_out.size) <= _CHEAP):
            continue
        if len(inputs) - 1 + len(their_inputs) > _MOST_INPUTS or len(code) + len(their_code) > _MOST_INSTRUCTIONS:
            continue
        found = [factors_through(view, their_out, theirs) for theirs in their_inputs]
        known = [f for f in found if f is not None]
        if len(known) < len(found) or not found:
            continue
        sizes = [[n for n, _ in factors] for factors in known[0][1]]
        moved = [
            View(theirs.where, f[0], *_flat([[s for _, s in factors] for factors in f[1]], sizes))
            for theirs, f in zip(their_inputs, known, strict=True)
        ]
        node.out = _cut(out, sizes)
        node.inputs, node.code = _inlined([_cut(v, sizes) for v in inputs], code, i, moved, their_code)
        return True
    return False


def _flat(strides: list[list[int]], sizes: list[list[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of all dimensions, innermost first, as dimensions, outermost first."""
    flat = [(n, s) for ns, ss in zip(sizes, strides, strict=True) for n, s in list(zip(ns, ss, strict=True))[::-1]]
    return tuple(n for n, _ in flat) or (1,), tuple(s for _, s in flat) or (1,)


def _cut(view: View, sizes: list[list[int]]) -> View:
    """A view with its dimensions cut into factors, innermost first; dimensions of one element are dropped."""
    strides = [
        [stride * step for step in split(size, parts)] if size > 1 else []
        for size, stride, parts in zip(view.size, view.stride, sizes, strict=True)
    ]
    return View(view.where, view.offset, *_flat(strides, sizes))


def _inlined(inputs: list[View], code: Code, at: int, theirs: list[View], their_code: Code) -> tuple[list[View], Code]:
    """Inputs and code of a node whose input ``at`` is computed from other inputs."""
    kept = [view for i, view in enumerate(inputs) if i != at]
    operands = list(dict.fromkeys([*kept, *theirs]))
    registers: dict[int, int] = {}
    whole: Code = []
    number = {i: operands.index(view) for i, view in enumerate(theirs)}
    for i, (opcode, a, b, value) in enumerate(their_code):
        whole.append((opcode, number[a], number.get(b, 0), value))
        number[len(theirs) + i] = len(operands) + len(whole) - 1
    result = number[len(theirs) + len(their_code) - 1]
    registers = {i: result if i == at else operands.index(view) for i, view in enumerate(inputs)}
    for i, (opcode, a, b, value) in enumerate(code):
        whole.append((opcode, registers[a], registers.get(b, 0), value))
        registers[len(inputs) + i] = len(operands) + len(whole) - 1
    return operands, _without_copies(whole, len(operands))


def _without_copies(code: Code, num_inputs: int) -> Code:
    """Instructions without copies and factors of one, at least one of them."""
    moved = {i: i for i in range(num_inputs)}
    kept: Code = []
    for i, (opcode, a, b, value) in enumerate(code):
        last = i == len(code) - 1 and not kept
        if not last and (opcode is Opcode.COPY or (opcode is Opcode.MULTIPLY_NUMBER and value == 1)):
            moved[num_inputs + i] = moved[a]
            continue
        kept.append((opcode, moved[a], moved[b], value))
        moved[num_inputs + i] = num_inputs + len(kept) - 1
    result = moved[num_inputs + len(code) - 1]
    if result != num_inputs + len(kept) - 1:
        kept.append((Opcode.COPY, result, 0, 0.0))
    return kept


def write_in_place(flow: Dataflow) -> None:
    """join(f(x), g(y))  ->  f(x) and g(y) into parts of one image, of elementwise f and g that nothing else reads."""
    for node in list(flow.nodes):
        if not isinstance(node, Join) or node.up != 1:
            continue
        whole, start, moved = node.out, 0, []
        for image in node.images:
            before = flow.part_writer(image)
            part = View(whole.where, whole.offset + start * whole.stride[1], image.size, whole.stride)
            start += image.size[1]
            alone = len(flow.readers(image)) == 1
            out = before.out.through(image, part) if alone and isinstance(before, Pointwise) else None
            if out is None or whole.dtype != image.dtype:
                break
            moved.append((before, out))
        else:
            for before, out in moved:
                before.out = out
            flow.swap(node, None)


def collapse_dimensions(flow: Dataflow) -> None:
    """F over [a, b]  ->  f over [a b], where all operands have both dimensions in line."""
    for node in flow.nodes:
        if isinstance(node, Pointwise):
            operands = [node.out, *node.inputs]
            loops = in_line(list(node.out.size), [list(view.stride) for view in operands]) or [(1, [1] * len(operands))]
            size = tuple(n for n, _ in loops)
            node.out, *node.inputs = (
                View(view.where, view.offset, size, tuple(strides[i] for _, strides in loops))
                for i, view in enumerate(operands)
            )
