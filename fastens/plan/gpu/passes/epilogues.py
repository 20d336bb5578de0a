"""What follows a convolution becomes its epilogue."""

from __future__ import annotations

import math
from typing import Any

from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.launch import Conv
from fastens.plan.graph import Node, Pointwise, View
from fastens.plan.layout import joined
from fastens.program.steps import Opcode


def add_residuals(flow: Dataflow) -> None:
    """(conv(x) + r) s  ->  conv(x, epilogue.residual=r, output_scale=s): saves a read and a write of the image."""
    for node in list(flow.nodes):
        if isinstance(node, Pointwise):
            _added(flow, node)


def _added(flow: Dataflow, node: Pointwise) -> None:
    out, inputs, code = node.out, node.inputs, node.code
    added = code[0][0] is Opcode.ADD and len(inputs) == 2 and {code[0][1], code[0][2]} == {0, 1}
    rest = code[1:] if added else code
    if (len(inputs) != 1 and not added) or len(rest) > 1 or not all(c[0] is Opcode.MULTIPLY_NUMBER for c in rest):
        return
    factor = rest[0][3] if rest else 1.0
    for i in range(len(inputs)):
        before = flow.writer(inputs[i])
        if not isinstance(before, Conv) or len(flow.readers(inputs[i])) != 1:
            continue
        behind, result = before.block.epilogue, before.out
        free = behind.output_activation == "none" and before.moments is None and flow.is_settled(before)
        free = free and not (added and behind.residual is not None)
        free = free and behind.output_scale == 1  # two numbers as their product would round once, not twice
        if not free or not _covers(inputs[i], result) or flow.writer(out) is None:
            continue
        if any(view.dtype != result.dtype for view in (out, *inputs)):
            continue
        new = result.through(inputs[i], out)
        residual = result.through(inputs[i], inputs[1 - i]) if added else None
        if new is None or not new.is_dense() or (added and (residual is None or not residual.is_dense())):
            continue
        before.out = new
        before.change(output_scale=factor, residual=residual if added else behind.residual)
        flow.nodes.remove(before)
        flow.swap(node, before)
        return


def _covers(read: View, written: View) -> bool:
    """Whether one view is all elements of the other, each once."""
    return math.prod(read.size) == math.prod(written.size) and _extent(read) == _extent(written)


def _extent(view: View) -> tuple[int, Any]:
    return view.offset, joined(sorted(((n, s) for n, s in zip(view.size, view.stride, strict=True) if n > 1),
                                      key=lambda pair: pair[1]))  # fmt: skip


def activate_once(flow: Dataflow) -> None:
    """Every reader of conv(x) applies one activation as it reads  ->  conv(x, epilogue.output_activation)."""
    for node in flow.nodes:
        if not isinstance(node, Conv) or node.block.epilogue.output_activation != "none" or node.moments:
            continue
        readers = flow.readers(node.out)
        kinds = {_before(reader, node.out) for reader in readers}
        if (
            flow.writer(node.out) is node
            and len(readers) > 1
            and len(kinds) == 1
            and kinds <= {"silu", "gelu", "gelu_tanh"}
        ):
            node.change(output_activation=kinds.pop())
            for reader in readers:
                if isinstance(reader, Conv):  # they all are: nothing else has an activation before it
                    reader.change(activation="none")


def _before(node: Node, view: View) -> str:
    """The activation that a convolution applies to a view, and nothing where it does more, or reads it otherwise."""
    if not isinstance(node, Conv) or not node.block.x.same_image(view):
        return ""
    if node.block.prologue.moments is not None:
        return ""
    once = [v.where for v in node.reads()].count(view.where) == 1
    return node.block.prologue.activation if once else ""
