"""G9: likelihood under the mean of K = 5 networks of SongUNet's shape, by RK45 at 1e-5/1e-5 with one probe.

Rivals: the published scheme (scipy on the host, drift and divergence apart, members in a loop), and torchdiffeq over
compiled members with drift and divergence from one pass.
"""

import pytest
import torch
from torch import nn

import fastens
from bench.bench_gpu_steps import K, network
from bench.bench_likelihood import published
from bench.gpu_contest import DEVICE, REHEARSAL, compiled, contest
from fastens.evaluation import Denoiser, likelihood
from fastens.evaluation.likelihood import PROBE_DRAWS
from fastens.reference.normal import normal
from fastens.schedules import Discrete

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
BATCH, TOLERANCE, STEPS = (2, 1e-2, 24) if REHEARSAL else (64, 1e-5, 64)


class Loop(nn.Module):
    """The mean of compiled members, one after the other."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.calls = [compiled(member) for member in members]

    def forward(self, x, t):
        return torch.stack([call(x, t) for call in self.calls]).mean(0)


def test_likelihood():
    networks, sizes = zip(*(network("songunet", seed) for seed in range(K)), strict=True)
    members, schedule = [model.float() for model in networks], Discrete.linear()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, 3, sizes[0], sizes[0], generator=generator) * 1.8 - 0.9
    probe = normal(0, PROBE_DRAWS, torch.arange(BATCH), tuple(x.shape[1:])).sign()
    ensemble = fastens.Ensemble(members).eval()

    def bits(model, **options):
        found = likelihood(Denoiser(model, schedule), x, levels=None, batch_size=BATCH, **options)
        return torch.from_numpy(found.rows)

    adaptive = {"method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}
    contest(
        "likelihood",
        "G9",
        f"K={K}, B={BATCH}, {sizes[0]}x{sizes[0]}, RK45 at {TOLERANCE:g}, one probe, float32",
        lambda: bits(ensemble, **adaptive),
        {
            "published scheme": lambda: lambda: published(members, schedule, x, probe, TOLERANCE, DEVICE),
            "torchdiffeq over compiled members": lambda: (lambda loop: lambda: bits(loop, **adaptive))(Loop(members)),
        },
        bits(ensemble, method="rk4", steps=STEPS),
        0.1 if REHEARSAL else 1e-2,
        {"published scheme": 10, "torchdiffeq over compiled members": 3},
        rounds=2,
    )
