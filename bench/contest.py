"""Ours beside its rivals: one benchmark per question, rounds interleaved, no speed without the right result."""

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Contender = Callable[[], Tensor]


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def peak_of(run: Callable[[], object]) -> int:
    """Bytes of main memory that a call takes at its peak, over what is in use before it; 0 where Linux is not."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process keeps would hide the next use of it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return 0
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def contest(
    benchmark: Any,
    ours: Contender,
    rivals: dict[str, Contender],
    expected: Tensor,
    tolerance: float,
    goal: str,
    question: str,
    shape: str,
    wanted: dict[str, float] | None = None,
    rounds: int = 30,
    floor: Callable[[], object] | None = None,
    warmup_rounds: int = 2,
    held: dict[str, Callable[[], int]] | None = None,
    scale: dict[str, object] | None = None,
    in_succession: int = 1,
) -> None:
    """Time ours as the benchmark, and every rival once before each of its rounds.

    Args:
        benchmark: the fixture of pytest-benchmark.
        ours: what is measured.
        rivals: what it is compared with, by name.
        expected: the reference's result; a contender further than ``tolerance`` from it is not timed but refused.
        tolerance: largest error relative to the largest magnitude.
        goal: name of the goal, e.g. "C1".
        question: what is measured.
        shape: shapes and dtype.
        wanted: ratio of the rival's time to ours that the goal asks for, by rival.
        rounds: rounds of the benchmark.
        floor: work that any contender has to do, timed beside them as "floor"; it has no result to check.
        warmup_rounds: rounds that do not count; without any, no contender is called a second time before them either.
        held: bytes that contenders hold between calls, "ours" too: their peak in a call comes on top.
        scale: network, K, B and dtype, for the plot of time against them.
        in_succession: calls that each contender makes in its turn, of which the last is timed. With one, its memory
            comes back from where the others have displaced it to.
    """
    contenders = {"ours": ours, **rivals}
    first: dict[str, float] = {}
    for name, run in contenders.items():
        started = time.perf_counter()
        result = run()
        first[name] = time.perf_counter() - started
        error = float((result.double() - expected.double()).abs().max() / expected.double().abs().max())
        if not error <= tolerance:
            raise AssertionError(f"{name} is {error:.1e} from the reference, so its speed means nothing")
        if warmup_rounds:
            run()
    timed: dict[str, Callable[[], object]] = {**rivals, **({"floor": floor} if floor else {})}
    seconds: dict[str, list[float]] = {name: [] for name in timed}

    def rivals_first() -> None:
        gc.collect(0)
        for name, run in timed.items():
            for _ in range(in_succession - 1):
                run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
        for _ in range(in_succession - 1):
            ours()

    benchmark.group = question
    benchmark.pedantic(ours, setup=rivals_first, rounds=rounds, warmup_rounds=warmup_rounds)
    quartiles = {name: np.percentile(values, (25, 50, 75)).tolist() for name, values in seconds.items()}
    benchmark.extra_info.update(
        goal=goal,
        shape=shape,
        rivals=quartiles,
        first_call=first,
        wanted=wanted or {},
        peak_bytes={name: holds() + peak_of(contenders[name]) for name, holds in (held or {}).items()},
        scale=scale or {},
        cpu=platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=commit(),
        load=os.getloadavg()[0],
    )
