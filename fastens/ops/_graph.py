"""Recording of what runs on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # runs before a recording, in which libraries choose their algorithms and Triton compiles


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
    # a stream of this device: the default one is of the device that recorded first; other threads may be at work
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output
