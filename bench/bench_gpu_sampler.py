"""G8: a whole run of a sampler of K = 5 networks as a few graphs, beside the network alone as often."""

import pytest
import torch

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, contest, skip_if_measured
from bench.gpu_networks import network
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from fastens.schedules import Discrete

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5


@pytest.mark.parametrize(
    ("method", "steps", "eta"), [("ddim", 1000, 0.0), ("ddim", 1000, 1.0), ("euler", 100, 0.0), ("heun", 100, 0.0)]
)
def test_whole_run(method, steps, eta):
    name = f"sampler_{method}_{'ancestral_' if eta else ''}{steps}"
    skip_if_measured(name)
    steps = 3 if REHEARSAL else steps
    members, sizes = zip(*(network("songunet", seed) for seed in range(K)), strict=True)
    ensemble = fastens.Ensemble(members).eval()
    denoiser = Denoiser(ensemble, Discrete.linear())
    shape, seed = (3, sizes[0], sizes[0]), 7
    recorded, stepwise, eager = (Sampler(denoiser, method, steps=steps, eta=eta) for _ in range(3))
    x = torch.zeros(1, *shape, device=DEVICE, dtype=DTYPE)
    time = torch.zeros(1, device=DEVICE)
    expected = eager(1, shape, seed)
    if not REHEARSAL:
        recorded.capture(1, shape)
        ensemble.capture(x, time)
    evaluations = steps * (2 if method == "heun" else 1)

    def network_alone():
        replayed = list(ensemble._recorded.values())
        for _ in range(evaluations):
            if replayed:
                replayed[0].replay()
            else:
                ensemble(x, time)
        return expected

    with torch.no_grad():
        contest(
            name,
            "G8" if method == "ddim" else "",
            f"K={K}, B=1, {steps} steps of {method}, eta={eta:g}, {DTYPE}",
            lambda: recorded(1, shape, seed),
            {
                "the network alone, as often": lambda: network_alone,
                "step by step, the network recorded": lambda: lambda: stepwise(1, shape, seed),
            },
            expected,
            1e-4 if REHEARSAL else 5e-2,
            {"the network alone, as often": 1 / 1.02} if method == "ddim" else {},
            rounds=5,
        )
