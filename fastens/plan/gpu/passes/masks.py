"""Dropout masks that differ in nothing but their layer are drawn at once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.graph import Draw

_MOST_DRAWN = 64 * 2**20  # bytes of masks that are held at a time so that one node draws them


def draw_together(flow: Dataflow) -> None:
    """draw(a), draw(b)  ->  draw(a, b): masks depend on inputs of the pass alone."""
    groups: dict[Any, list[Draw]] = defaultdict(list)
    for node in flow.nodes:
        if isinstance(node, Draw):
            rows = (node.members, node.samples, node.rows_per_member)
            groups[node.drawn, *rows, node.threshold].append(node)
    for group in groups.values():
        held = sum(bits.where.num_bytes for node in group for bits in node.bits)
        if len(group) == 1 or held > _MOST_DRAWN:
            continue
        first, *others = group
        for node in others:
            first.bits, first.keys = first.bits + node.bits, first.keys + node.keys
            first.channels, first.steps = first.channels + node.channels, first.steps + node.steps
            flow.nodes.remove(node)
        flow.index()
