"""Ours beside its rivals: one benchmark per question, rounds interleaved, no speed without the right result."""

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Contender = Callable[[], Tensor]


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


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
        run()
    timed: dict[str, Callable[[], object]] = {**rivals, **({"floor": floor} if floor else {})}
    seconds: dict[str, list[float]] = {name: [] for name in timed}

    def rivals_first() -> None:
        gc.collect(0)
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)

    benchmark.group = question
    benchmark.pedantic(ours, setup=rivals_first, rounds=rounds, warmup_rounds=2)
    quartiles = {name: np.percentile(values, (25, 50, 75)).tolist() for name, values in seconds.items()}
    benchmark.extra_info.update(
        goal=goal,
        shape=shape,
        rivals=quartiles,
        first_call=first,
        wanted=wanted or {},
        cpu=platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=_commit(),
        load=os.getloadavg()[0],
    )
