"""Ours alone, without rivals: ``python -m bench.gpu_ours DIR`` times a step of each network and batch in minutes.

``ours.json`` has, for each, the median milliseconds of a replayed step, of the first call, and what the device can do;
and a step whose kernels do not overlap (``FASTENS_OVERLAP=0``), for what that is worth.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, clock, environment
from bench.gpu_launches import K
from bench.gpu_networks import network
from bench.gpu_roofline import limits

ROUNDS = 3 if REHEARSAL else 20
STEPS = [("songunet", 1), ("songunet", 16), ("songunet", 256), ("ddpmpp", 1), ("ffhq256", 1)]
APART = ("songunet", 1)  # measured again with each kernel launched behind the end of the one before


def step(name, batch):
    """Milliseconds of the first call, with all that is measured and compiled in it, and of a later one."""
    members, size = zip(*(network(name, seed) for seed in range(K)), strict=True)
    batch = min(batch, 2) if REHEARSAL else batch
    x = torch.randn(batch, 3, size[0], size[0], device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)
    ensemble = fastens.Ensemble(members).eval()
    del members
    started = time.perf_counter()
    ensemble(x, t)
    if not REHEARSAL:
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(8):
        ensemble(x, t)
    seconds = statistics.median(clock(lambda: ensemble(x, t)) for _ in range(ROUNDS))
    return {"network": name, "batch": batch, "first": 1e3 * first, "step": 1e3 * seconds}


@torch.no_grad()
def main(folder):
    if not DEVICE:
        raise SystemExit("gpu_ours needs a CUDA device, or FASTENS_BENCH_DEVICE=cpu to rehearse")
    folder.mkdir(parents=True, exist_ok=True)
    content = {**environment(), "limits": limits(), "steps": []}
    print({name: f"{value:.3g}" for name, value in content["limits"].items()})
    for name, batch, overlap in [(*each, "1") for each in (STEPS[:1] if REHEARSAL else STEPS)] + [(*APART, "0")]:
        with mock.patch.dict(os.environ, FASTENS_OVERLAP=overlap):
            content["steps"].append({**step(name, batch), "overlap": overlap})
        print(content["steps"][-1], flush=True)
        (folder / "ours.json").write_text(json.dumps(content, indent=1) + "\n")
        if not REHEARSAL:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
