"""Recording of what runs on a GPU as a CUDA graph, and of what has to live as long as the graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
    """Record ``run`` as a CUDA graph; return what replays it, and the outputs that a replay overwrites."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    held: list[Any] = []
    # a stream of this device: the default one is of the device that recorded first; other threads may be at work
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        before, _recording.held = getattr(_recording, "held", None), held
        try:
            output = run()
        finally:
            _recording.held = before
    return functools.partial(_replay, graph, held), output


def _replay(graph: torch.cuda.CUDAGraph, held: list[Any]) -> None:
    graph.replay()
