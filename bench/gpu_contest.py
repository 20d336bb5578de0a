"""Ours beside its rivals on a GPU: graphs, events and interleaved rounds; no speed without the right result.

``FASTENS_BENCH_DEVICE=cpu`` rehearses everything on small sizes without a GPU: graphs become plain calls.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

DEVICE = os.environ.get("FASTENS_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "")
REHEARSAL = DEVICE == "cpu"
DTYPE = torch.float32 if REHEARSAL else torch.bfloat16


def graphed(run, streams=1):
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


def _clock(run):
    if REHEARSAL:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def contest(name, goal, shape, ours, rivals, expected, tolerance, wanted, extra=None, rounds=30):
    """Time ours and each rival in interleaved rounds and add the result to ``$FASTENS_BENCH_OUT``.

    A rival that does not run is recorded with its error; ours, or a rival that is further than ``tolerance`` from
    ``expected``, fails.
    """
    contenders, failed = {"ours": ours}, {}
    for rival, make in rivals.items():
        try:
            run = make()
            run()
            contenders[rival] = run
        except Exception as error:  # a rival that cannot run is a result
            failed[rival] = f"{type(error).__name__}: {error}"[:300]
    scale = float(expected.double().abs().max())
    for rival, run in contenders.items():
        error = float((run().double() - expected.double()).abs().max()) / scale
        assert error <= tolerance, f"{name}: {rival} is {error:.1e} from the reference, so its speed means nothing"
    seconds = {rival: [] for rival in contenders}
    for _ in range(3 if REHEARSAL else rounds):
        for rival, run in contenders.items():
            seconds[rival].append(_clock(run))
    row = {
        "name": name,
        "goal": goal,
        "shape": shape,
        "seconds": {rival: np.percentile(values, (25, 50, 75)).tolist() for rival, values in seconds.items()},
        "failed": failed,
        "wanted": wanted,
        **(extra or {}),
        **environment(),
    }
    folder = Path(os.environ.get("FASTENS_BENCH_OUT", "bench-out"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def environment():
    """Where a number was measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found = {"device": "cpu rehearsal: no speed", "torch": torch.__version__, "commit": git.stdout.strip()}
    if not REHEARSAL:
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
    return found


def copy_seconds(num_bytes):
    """Median time of a device copy that reads and writes ``num_bytes`` in all: what bandwidth is measured against."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return float(np.median([_clock(lambda: target.copy_(source)) for _ in range(20)]))
