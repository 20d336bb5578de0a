"""G1, G2, G3: one score step of K = 5 networks against every rival, in the shapes of SongUNet, DDPM++ and FFHQ-256."""

import contextlib
import os
import time

import pytest
import torch

import fastens
from bench.gpu_contest import (
    DEVICE,
    DTYPE,
    REHEARSAL,
    compiled,
    contest,
    graphed,
    library_only,
    parallel,
    skip_if_measured,
    within,
)
from bench.gpu_networks import NETWORKS, flops_per_image, in_float32, network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
GOALS = {
    ("songunet", 1): {"eager loop": 40, "compiled loop": 8, "rival 1: parallel graph": 2.5},
    ("songunet", 16): {"rival 1: parallel graph": 1.8, "rival 3: vmap, compiled graph": 3},
    ("songunet", 256): {"rival 1: parallel graph": 1.35},
}
CALLS = 8  # of the ensemble before it is timed
ONE = "one member, compiled graph"
GOAL_OF_BATCH = {1: "G1", 16: "G2", 256: "G3"}


@contextlib.contextmanager
def launching():
    """Every kernel of a plan launched by the host, and no graph replayed."""
    os.environ["FASTENS_GRAPHS"] = "0"
    try:
        yield
    finally:
        del os.environ["FASTENS_GRAPHS"]


def seconds_of(call):
    """Of one call, and all that it has the device do."""
    started = time.perf_counter()
    call()
    if not REHEARSAL:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_of(call):
    """GiB of memory that are held at most meanwhile."""
    if REHEARSAL:
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def mean(outputs):
    return torch.stack(outputs).mean(0)


def rivals_of(members, x, t):
    """Every rival of one score step; members compiled once, since those of one class share their code."""

    def one(model):
        return lambda: model(x, t)

    def loop(runs):
        return lambda: mean([run() for run in runs])

    def folded(convolution):
        ensemble = fastens.Ensemble(members, backend="reference").eval()
        run = compiled(lambda: ensemble(x, t))
        inside = within(lambda: library_only(convolution), run)
        inside()  # checks the fold, which no compiler and no recording can
        return graphed(inside)

    def vmapped():
        params, buffers = torch.func.stack_module_state(members)

        def call(p, b, x):
            return torch.func.functional_call(members[0], (p, b), (x, t))

        run = compiled(torch.vmap(call, in_dims=(0, 0, None)))
        return graphed(lambda: run(params, buffers, x).mean(0))

    singles = [one(compiled(model)) for model in members]
    return {
        "eager loop": lambda: loop([one(model) for model in members]),
        "compiled loop": lambda: loop(singles),
        "rival 1: parallel graph": lambda: parallel(singles, compiled(mean)),
        "rival 5: K single-member graphs": lambda: loop([graphed(run) for run in singles]),
        "rival 2: folded, K convolutions, compiled graph": lambda: folded("members"),
        "rival 4: folded, grouped convolutions, compiled graph": lambda: folded("grouped"),
        "rival 3: vmap, compiled graph": vmapped,
    }


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_step(name, batch):
    if name == "ffhq256" and batch > 16:
        pytest.skip("K = 5 members of 256 images of 256x256 are half a petaflop a step")
    title = f"step_{name}_{batch}"
    skip_if_measured(title)
    batch = min(batch, 2) if REHEARSAL else batch
    members, size = zip(*(network(name, seed) for seed in range(K)), strict=True)
    x = torch.randn(batch, 3, size[0], size[0], device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)
    with torch.no_grad():
        flops = flops_per_image(members[0], x, t)
        expected = in_float32(members, x, t).mean(0)
        ensemble = fastens.Ensemble(members).eval()
        first = seconds_of(lambda: ensemble(x, t))
        peak = peak_of(lambda: [ensemble(x, t) for _ in range(CALLS)])  # the plan replays itself then
        capture = 0.0 if REHEARSAL else seconds_of(lambda: ensemble.capture(x, t))
        parameters = sum(p.numel() for p in members[0].parameters())
        contest(
            title,
            GOAL_OF_BATCH.get(batch, "") if name == "songunet" else "",
            f"{name}: K={K}, B={batch}, {size[0]}x{size[0]}, {parameters:,} parameters, {DTYPE}",
            lambda: ensemble(x, t),
            rivals_of(members, x, t) | {ONE: lambda: graphed(compiled(lambda: members[0](x, t)))},
            expected,
            1e-4 if REHEARSAL else 5e-2,
            GOALS.get((name, batch), {}),
            beside={
                "ours, not captured": lambda: ensemble._evaluated((x, t), {}),
                "ours, launched from the host": within(launching, lambda: ensemble._evaluated((x, t), {})),
            },
            unlike=[ONE],
            extra={
                "flops": K * batch * flops,
                "report": str(ensemble.report()),
                "first call, s": first,
                "capture, s": capture,
                "peak, GiB": peak,
            },
        )
