"""Counters of a launch's tiles, by which a program knows that it is the last to arrive: zero before and behind it.

A kernel puts its counters back to zero itself, so that none is launched to do so. What must never happen is that two
launches which may run at the same time share them. Outside of a capture these are launches on different streams: each
stream has counters. A captured launch runs on any stream, whenever its graph does: it has counters that no launch
shares but one which writes the same result, and two of these at a time were wrong without them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fastens.device import device_of, on_gpu

OF_STREAM = 1024  # at least; splits are for tiles that are fewer than half of the multiprocessors
OF_CAPTURES = 1 << 18  # of a device: 1 MB, a hundred graphs of sixty launches and forty tiles

_lock = threading.Lock()
_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_for_captures: dict[torch.device, Tensor] = {}  # what captures have left
_captured: dict[tuple[torch.device, int, int], Tensor] = {}


def counters(tiles: int, y: Tensor) -> Tensor:
    """Return int32 counters, at least as many as tiles and zero, for a launch on the current stream that writes y."""
    if not on_gpu(y):  # nothing runs at the same time, and an interpreted kernel may be interrupted
        return torch.zeros(tiles, dtype=torch.int32)
    device, on = y.device, device_of(y)
    with _lock:
        if on.capturing():
            return _of_capture(tiles, y)
        key = (device, on.stream())
        held = _of_streams.get(key)
        if held is None or len(held) < tiles:
            held = _of_streams[key] = torch.zeros(max(tiles, OF_STREAM), dtype=torch.int32, device=device)
        if device not in _for_captures:  # now: memory that a capture asks for is zeroed when its graph runs
            _for_captures[device] = torch.zeros(OF_CAPTURES, dtype=torch.int32, device=device)
            on.settle()  # graphs run on any stream
        return held


def _of_capture(tiles: int, y: Tensor) -> Tensor:
    key = (y.device, y.data_ptr(), tiles)
    held = _captured.get(key)
    if held is None:
        left = _for_captures.get(y.device)
        if left is None or len(left) < tiles:  # zeroed by the graph, whenever it runs
            return torch.zeros(tiles, dtype=torch.int32, device=y.device)
        held, _for_captures[y.device] = left[:tiles], left[tiles:]
        _captured[key] = held
    return held
