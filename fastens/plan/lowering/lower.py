"""Lowering a whole recording: its inputs, every operation in turn, and its outputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastens.plan.graph import Node, View
from fastens.plan.lowering import attention, dropout, elementwise, layers
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.registry import copy_out, lower
from fastens.plan.lowering.target import Target
from fastens.plan.lowering.values import Leaf, Stored
from fastens.plan.memory import Cast
from fastens.trace.functionalize import contiguous, functionalized
from fastens.trace.record import Recording, Ref

_HANDLERS = (attention, dropout, elementwise, layers)  # imported for the handlers that they register


def lower_all(recording: Recording, num_members: int, target: Target) -> tuple[Builder, list[Ref]]:
    """Lower a whole recording: every operation, and outputs, contiguous, in the arguments behind the inputs.

    Args:
        recording: of the pass.
        num_members: K.
        target: the back end that it is lowered for.

    Returns:
        What has built the graph, and the outputs.
    """
    builder = Builder(recording, num_members, target)
    operations, outputs = functionalized(recording.operations, recording.outputs, recording.inputs)
    builder.uses = Counter(ref.storage for op in operations for ref in op.reads)
    builder.uses.update(ref.storage for ref in outputs)
    for ref in recording.inputs:
        builder.values[ref.storage] = Stored(builder.argument(ref.dtype))
        if ref is recording.row_members:
            builder.row_members = builder.stored(ref)
    places = [builder.argument(ref.dtype) for ref in outputs]
    for op in operations:
        lower(builder, op)
    for ref, place in zip(outputs, places, strict=True):
        if ref.dtype in target.floats or target.copies_all:
            builder.expression(Leaf(ref), View(place, 0, ref.size, contiguous(ref.size)))
        else:
            copy_out(builder, ref, place)
    builder.nodes = needed(builder.nodes, set(places))
    return builder, outputs


def needed(nodes: list[Node], outputs: set[Any]) -> list[Node]:
    """Nothing reads f(x)  ->  no f(x).

    A write to a part of a value computes all that waits before, which a later node may have taken in.

    Args:
        nodes: in the order in which they run.
        outputs: the memory that is read behind the last.
    """
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if not read.isdisjoint(map(_memory, node.writes())):
            read.update(map(_memory, node.reads()))
            kept.append(node)
    return kept[::-1]


def _memory(view: View) -> Any:
    return view.where.where if isinstance(view.where, Cast) else view.where
