"""How long a function keeps a device busy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fastens.device import device_of
from fastens.kernels._graph import record_graph

REPETITIONS = 10  # calls of a timing at most
ONE_TIMING = 1e-3  # seconds that fewer calls last, or the clock's own steps and the way to the first would count


def clock(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Return what times one call of ``run``, in seconds, whenever it is called.

    On a GPU it is the device's time, of one to ten calls recorded as one graph: what the host takes to launch them,
    which a captured step does not pay, would hide the difference. ``run`` has run before: it is called at once.

    Args:
        run: takes nothing; what it returns is dropped.
        device: where it runs.
    """
    on = device_of(device)
    stopwatch = on.stopwatch()
    if not on.launches:
        return functools.partial(stopwatch, run)
    number = repetitions(stopwatch(run))

    def several() -> None:
        for _ in range(number):
            run()

    replay, _ = record_graph(several, device, warm_up=1)

    def seconds() -> float:
        with on.current():
            replay()  # wakes the device, and brings the weights as near as a second evaluation finds them
            return stopwatch(replay) / number

    return seconds


def repetitions(seconds: float) -> int:
    """Return the number of calls in one timing, given the approximate seconds of a call."""
    return max(1, min(REPETITIONS, math.ceil(ONE_TIMING / max(seconds, 1e-9))))
