"""Recording of what runs on a GPU as a graph, and of what has to live as long as the graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastens.device import device_of

WARM_UP = 3  # runs before a recording, in which libraries choose their algorithms and Triton compiles

T = TypeVar("T")
_recording = threading.local()


def keep(x: T) -> T:
    """Return x, and let it live as long as the graph that is being recorded, if any.

    A graph reads memory at its address. What is allocated while it is recorded is its own; for what was there before,
    and is let go of by somebody who does not know of graphs (a cache, a plan), this is to be called.
    """
    held: list[Any] | None = getattr(_recording, "held", None)
    if held is not None:
        held.append(x)
    return x


def record_graph(
    run: Callable[[], Any], device: torch.device, warm_up: int = WARM_UP
) -> tuple[Callable[[], None], Any]:
    """Record ``run`` as a graph; return what replays it, and the outputs that a replay overwrites."""
    held: list[Any] = []

    def often() -> None:
        for _ in range(warm_up):
            run()

    def holding() -> Any:
        before, _recording.held = getattr(_recording, "held", None), held
        try:
            return run()
        finally:
            _recording.held = before

    replay, output = device_of(device).record(often, holding)
    return functools.partial(_replay, replay, held), output


def _replay(replay: Callable[[], None], held: list[Any]) -> None:
    replay()
