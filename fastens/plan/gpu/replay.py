"""Launches as CUDA graphs: what a plan has launched a few times is recorded, and a call costs the host one replay."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fastens.device import device_of
from fastens.kernels import _graph
from fastens.ops._choice import can_measure, observed

AFTER = 4  # runs without a graph; libraries have chosen their algorithms by then, and Triton has compiled
MOST = 4  # graphs of one plan: under other factors of the members the last layer is another launch
MOST_BYTES = 2**29  # of a plan's arena that is recorded whatever memory is free: a graph's is its own, and stays
SHARE = 2 * MOST  # arenas of a larger plan that the free memory holds: all its graphs take half of it at most
_MOST_KINDS = 64  # whose runs are counted


class Replays:
    """The graphs of one plan. Set ``FASTENS_GRAPHS=0`` to launch every kernel from the host instead.

    Args:
        device: of the launches.
        num_bytes: of the plan's arena.

    Attributes:
        why_not: the error because of which there will be none, empty where there was none.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._on = device_of(device)
        self._num_bytes = num_bytes
        self._device = device
        self._runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Callable[[], None], list[Tensor]]] = {}
        self.why_not = ""

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, kind: Hashable, launch: Callable[[], list[Tensor]]) -> tuple[list[Tensor], bool]:
        """Launch, or replay what this kind launched before.

        Args:
            kind: what differs between the launches of one plan.
            launch: reads and writes memory that stays where it is.

        Returns:
            What ``launch`` returned, and whether the next run overwrites it.
        """
        if not self._on.launches or observed() or os.environ.get("FASTENS_GRAPHS") == "0":
            return launch(), False
        found = self._graphs.get(kind)
        if found is None:
            if len(self._runs) > _MOST_KINDS:
                self._runs.clear()
            self._runs[kind] += 1
            if not self._records(kind):
                return launch(), False
            try:
                with torch.inference_mode(False), torch.no_grad():
                    found = self._graphs[kind] = _graph.record_graph(launch, self._device, warm_up=1)
            except Exception as error:  # a library may do what cannot be recorded: the launches go on without
                self.why_not = f"{type(error).__name__}: {error}"[:200]
                return launch(), False
        found[0]()
        return found[1], True

    def _records(self, kind: Hashable) -> bool:
        often = self._runs[kind] > AFTER and len(self._graphs) < MOST
        return often and not self.why_not and can_measure() and self._fits()

    def _fits(self) -> bool:
        """Whether there is memory for graphs whose launches keep as much as the arena."""
        return self._num_bytes <= MOST_BYTES or self._num_bytes * SHARE <= self._on.free_memory()
