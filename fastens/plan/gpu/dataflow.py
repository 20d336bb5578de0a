"""Which launch writes and which ones read each piece of memory, so that several launches can become one."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fastens.plan.gpu.launch import Entry, Launch, Outputs, View
from fastens.plan.memory import Buffer, Kept

_MOST_COMPARED = 1 << 14  # elements of views that are told apart one by one


class Dataflow:
    """Launches in their order, and what they make.

    Attributes:
        launches: in the order in which they run.
        outputs: stands for what reads the outputs of the pass.
        new_buffer: makes a buffer for a number of elements of a dtype.

    Args:
        launches: the launches.
        outputs: where the outputs are.
        dtypes: of the slots of inputs and outputs.
        new_buffer: as above.
    """

    def __init__(
        self,
        launches: list[Launch],
        outputs: list[View],
        dtypes: dict[int, torch.dtype],
        new_buffer: Callable[[int, torch.dtype], Buffer],
    ) -> None:
        self.launches = launches
        self.outputs = Outputs(outputs)
        self.new_buffer = new_buffer
        self._dtypes = dtypes
        self.index()

    def index(self) -> None:
        """Find again who writes and reads what; needed after launches have changed."""
        self._writers: dict[Any, list[Launch]] = defaultdict(list)
        self._readers: dict[Any, list[Launch]] = defaultdict(list)
        for launch in (*self.launches, self.outputs):
            for where in dict.fromkeys(view.where for view in launch.writes()):
                self._writers[where].append(launch)
            for where in dict.fromkeys(view.where for view in launch.reads()):
                self._readers[where].append(launch)

    def writer(self, view: View) -> Launch | None:
        """The launch that alone writes to the memory of a view, none where several do or nothing does."""
        found = self._writers[view.where]
        return found[0] if len(found) == 1 else None

    def part_writer(self, view: View) -> Launch | None:
        """The launch that alone writes to a view, while others may write to the rest of its memory."""
        inside, outside = [], []
        for launch in self._writers[view.where]:
            parts = [part for part in launch.writes() if part.where is view.where]
            (inside if any(view.through(part, part) for part in parts) else outside).append(launch)
        others = [part for launch in outside for part in launch.writes() if part.where is view.where]
        if len(inside) != 1 or any(math.prod(part.size) > _MOST_COMPARED for part in (view, *others) if others):
            return None
        own = _elements(view) if others else set()
        return None if any(own & _elements(part) for part in others) else inside[0]

    def readers(self, view: View) -> list[Launch]:
        """All launches that read from the memory of a view."""
        return self._readers[view.where]

    def dtype(self, view: View) -> torch.dtype:
        """The dtype that elements of a view are stored in, which may be narrower than the one they are computed in."""
        if isinstance(view.where, Buffer | Entry):
            return view.where.dtype
        return view.where.tensor.dtype if isinstance(view.where, Kept) else self._dtypes[view.where]

    def is_settled(self, launch: Launch) -> bool:
        """Whether all that a launch reads is written once, so that it may run later."""
        return all(len(self._writers[view.where]) <= 1 for view in launch.reads())

    def remove_unread(self) -> None:
        """Drop launches whose results nothing reads."""
        while True:
            unread = [launch for launch in self.launches if not any(map(self.readers, launch.writes()))]
            if not unread:
                return
            self.launches = [launch for launch in self.launches if launch not in unread]
            self.index()

    def position(self, launch: Launch) -> int:
        """When a launch runs."""
        return next(i for i, other in enumerate(self.launches) if other is launch)

    def swap(self, old: Launch, new: Launch | None) -> None:
        """Put a launch in the place of another, or drop it."""
        at = self.position(old)
        self.launches[at : at + 1] = [] if new is None else [new]
        self.index()


def split(size: int, parts: list[int]) -> list[int]:
    """Strides of the factors that a dimension of ``size`` elements has, innermost first, in units of its own."""
    steps = [1, *itertools.accumulate(parts, lambda a, b: a * b)]
    assert steps[-1] == size
    return steps[:-1]


def _elements(view: View) -> set[int]:
    steps = [range(0, n * s, s) if s else (0,) for n, s in zip(view.size, view.stride, strict=True)]
    return {view.offset + sum(place) for place in itertools.product(*steps)}
