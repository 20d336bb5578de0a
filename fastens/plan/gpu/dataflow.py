"""Which node writes and which ones read each piece of memory, so that several nodes can become one."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fastens.plan.graph import Node, Outputs, View
from fastens.plan.memory import Buffer, KeptTensors
from fastens.trace.record import Ref

_MOST_COMPARED = 1 << 14  # elements of views that are told apart one by one


class Dataflow:
    """Nodes in their order, and who writes and reads what.

    Attributes:
        nodes: in the order in which they run; passes change them in place.
        outputs: stands for what reads the outputs of the pass.
        inputs: of the pass.
        constants: keeps the weights of layers that become one.
        new_buffer: makes a buffer for a number of elements of a dtype.

    Args:
        nodes: the nodes.
        outputs: where the outputs are.
        inputs: as above.
        constants: as above.
        new_buffer: as above.
    """

    def __init__(
        self,
        nodes: list[Node],
        outputs: list[View],
        inputs: list[Ref],
        constants: KeptTensors,
        new_buffer: Callable[[int, torch.dtype], Buffer],
    ) -> None:
        self.nodes = nodes
        self.outputs = Outputs(outputs)
        self.inputs = inputs
        self.constants = constants
        self.new_buffer = new_buffer
        self.index()

    def index(self) -> None:
        """Find again who writes and reads what; needed after nodes have changed."""
        self._writers: dict[Any, list[Node]] = defaultdict(list)
        self._readers: dict[Any, list[Node]] = defaultdict(list)
        for node in (*self.nodes, self.outputs):
            for where in dict.fromkeys(view.where for view in node.writes()):
                self._writers[where].append(node)
            for where in dict.fromkeys(view.where for view in node.reads()):
                self._readers[where].append(node)

    def writer(self, view: View) -> Node | None:
        """The node that alone writes to the memory of a view, none where several do or nothing does."""
        found = self._writers[view.where]
        return found[0] if len(found) == 1 else None

    def part_writer(self, view: View) -> Node | None:
        """The node that alone writes to a view, while others may write to the rest of its memory."""
        inside, outside = [], []
        for node in self._writers[view.where]:
            parts = [part for part in node.writes() if part.where is view.where]
            (inside if any(view.through(part, part) for part in parts) else outside).append(node)
        others = [part for node in outside for part in node.writes() if part.where is view.where]
        if len(inside) != 1 or any(math.prod(part.size) > _MOST_COMPARED for part in (view, *others) if others):
            return None
        own = _elements(view) if others else set()
        return None if any(own & _elements(part) for part in others) else inside[0]

    def readers(self, view: View) -> list[Node]:
        """All nodes that read from the memory of a view."""
        return self._readers[view.where]

    def is_settled(self, node: Node) -> bool:
        """Whether all that a node reads is written once, so that it may run later."""
        return all(len(self._writers[view.where]) <= 1 for view in node.reads())

    def remove_unread(self) -> None:
        """Nothing reads f(x)  ->  no f(x)."""
        while True:
            unread = [node for node in self.nodes if not any(map(self.readers, node.writes()))]
            if not unread:
                return
            self.nodes = [node for node in self.nodes if node not in unread]
            self.index()

    def position(self, node: Node) -> int:
        """When a node runs."""
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def swap(self, old: Node, new: Node | None) -> None:
        """Put a node in the place of another, or drop it."""
        at = self.position(old)
        self.nodes[at : at + 1] = [] if new is None else [new]
        self.index()


def split(size: int, parts: list[int]) -> list[int]:
    """Strides of the factors that a dimension of ``size`` elements has, innermost first, in units of its own."""
    steps = [1, *itertools.accumulate(parts, lambda a, b: a * b)]
    assert steps[-1] == size
    return steps[:-1]


def _elements(view: View) -> set[int]:
    steps = [range(0, n * s, s) if s else (0,) for n, s in zip(view.size, view.stride, strict=True)]
    return {view.offset + sum(place) for place in itertools.product(*steps)}
