"""Ours beside its rivals on a GPU: graphs, events and interleaved rounds; no speed without the right result.

``FASTENS_BENCH_DEVICE=cpu`` rehearses everything on small sizes without a GPU: graphs become plain calls. A result is
one JSON file in ``$FASTENS_BENCH_OUT``; one that is complete and of the present commit is not measured again.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastens.engine import planned
from fastens.ops import _dispatch, conv

DEVICE = os.environ.get("FASTENS_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "")
REHEARSAL = DEVICE == "cpu"
if REHEARSAL:  # which runs the plan that a GPU runs
    planned.launches_on = lambda _: True
DTYPE = torch.float32 if REHEARSAL else torch.bfloat16
OUT = Path(os.environ.get("FASTENS_BENCH_OUT", "bench-out"))
SECONDS = float(os.environ.get("FASTENS_BENCH_SECONDS", "420"))  # after that no further rival is prepared
_STARTED = time.monotonic()
_HEAD_START = 200_000  # cycles that the device sleeps, so that what is timed was launched before it begins
ONE_TIMING = 2e-3  # seconds that a timing takes at least, of up to ten calls
FEW_ROUNDS = 1 if REHEARSAL else 5  # of what is written before all rivals are there


def graphed(run):
    """``run`` as a CUDA graph, warmed up on a side stream; a plain call in a rehearsal."""
    if REHEARSAL:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay


def parallel(runs, combine):
    """Rival 1: all members in one graph, each on a stream of its own, then the aggregate."""
    if REHEARSAL:
        return lambda: combine([run() for run in runs])
    branches = [torch.cuda.Stream() for _ in runs]

    def together():
        main, outputs = torch.cuda.current_stream(), []
        for branch, run in zip(branches, runs, strict=True):
            branch.wait_stream(main)
            with torch.cuda.stream(branch):
                outputs.append(run())
        for branch in branches:
            main.wait_stream(branch)
        return combine(outputs)

    return graphed(together)


def compiled(function):
    """A rival at its best settings; in a rehearsal as it is, since compiling proves nothing there."""
    return function if REHEARSAL else torch.compile(function, mode="max-autotune-no-cudagraphs")


@contextlib.contextmanager
def library_only(convolution="members"):
    """The fold without our kernels: torch's operations, and the named library convolution, also under a compiler."""
    choice, default = _dispatch._choice, conv.CHOICE.default
    _dispatch._choice = lambda name, *_: name
    conv.CHOICE.default = convolution
    try:
        yield
    finally:
        _dispatch._choice, conv.CHOICE.default = choice, default


def within(context, run):
    """``run`` with a context around every call."""

    def call():
        with context():
            return run()

    return call


def clock(run, calls=1):
    """Seconds of one call of several in a row, as a sampler makes them: the host's where it is slower than the device.

    The first is launched while the device sleeps, so that a replay is not charged with its launch.
    """
    if REHEARSAL:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def skip_if_measured(name):
    """Skip a question whose result is there, complete and of this commit."""
    path = OUT / f"{name}.json"
    if path.exists():
        row = json.loads(path.read_text())
        if row["complete"] and row["commit"] == commit() and row["device"] == device():
            pytest.skip(f"{path} has it; delete it to measure again")


def contest(
    name, goal, shape, ours, rivals, expected, tolerance, wanted, beside=None, unlike=(), extra=None, rounds=30
):
    """Time ours and each rival in interleaved rounds and write the result, after each rival anew.

    Args:
        name: of the result's file.
        goal: "G1" and so on; empty for a question without goal.
        shape: shapes and dtype.
        ours: what is measured.
        rivals: name -> function that prepares the rival and returns it. One that cannot run, or is further than
            ``tolerance`` from the reference, is recorded with its error and has no speed.
        expected: the reference's result; ours fails where it is further from it.
        tolerance: relative to the largest magnitude.
        wanted: ratio of the rival's time to ours that the goal asks for, by name.
        beside: further work that is timed and has no result to check, by name, such as a copy of as many bytes.
        unlike: rivals that draw random numbers of their own: their results are checked for shape only.
        extra: kept with the result.
        rounds: how often everything is timed.
    """
    rounds = 3 if REHEARSAL else rounds
    scale = float(expected.double().abs().max())

    def problem(rival, result):
        if result.shape != expected.shape:
            return f"gives {list(result.shape)}, expected {list(expected.shape)}"
        error = float((result.double() - expected.double()).abs().max()) / scale
        return "" if error <= tolerance or rival in unlike else f"{error:.1e} from the reference, so no speed counts"

    why = problem("ours", ours())
    assert not why, f"{name}: ours: {why}"
    contenders, failed, late = {"ours": ours, **(beside or {})}, {}, []
    row = {
        "name": name, "goal": goal, "shape": shape, "wanted": {} if REHEARSAL else wanted, **(extra or {}),
        **environment(),
    }  # fmt: skip

    def write(rounds, complete):
        seconds = _interleaved(contenders, rounds)
        OUT.mkdir(parents=True, exist_ok=True)
        found = {"seconds": seconds, "failed": failed, "complete": complete}
        (OUT / f"{name}.json").write_text(json.dumps({**row, **found}, indent=1) + "\n")

    write(rounds, not rivals)
    for rival, make in rivals.items():
        if time.monotonic() - _STARTED > SECONDS:
            failed[rival] = "not run: no time left; run the part again, compilers start warm then"
            late.append(rival)
            continue
        try:
            run = make()
            why = problem(rival, run())
        except Exception as error:  # a rival that cannot run is a result
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if why:
            failed[rival] = why
        else:
            contenders[rival] = run
        write(FEW_ROUNDS, False)
    if rivals:
        write(rounds, not late)
    assert not late, f"{name}: {', '.join(late)} not run; run the part again"


def _interleaved(contenders, rounds):
    """Quartiles of the seconds of each contender, in rounds of all of them."""
    calls = {name: max(1, min(10, round(ONE_TIMING / max(clock(run), 1e-9)))) for name, run in contenders.items()}
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(clock(run, calls[name]))
    return {name: np.percentile(values, (25, 50, 75)).tolist() for name, values in seconds.items()}


def commit():
    given = os.environ.get("FASTENS_BENCH_COMMIT")
    if given:  # of bench/gpu.sh, which also runs where the tree has no history
        return given
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def device():
    return "cpu rehearsal: no speed" if REHEARSAL else torch.cuda.get_device_name()


def environment():
    """Where a number was measured."""
    packages = ("torch", "triton", "numpy")
    found = {
        "device": device(),
        "commit": commit(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }
    if not REHEARSAL:
        smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver, clock, power = (
            subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        )
        found |= {"driver": driver, "highest clock": clock, "power limit": power, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def copy_of(num_bytes):
    """A device copy that reads and writes ``num_bytes`` in all: what bandwidth is measured against."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
