"""Likelihood of digits under the mean of five members, against the published scheme (arXiv 2601.11444's code)."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import fastens
from bench.contest import contest
from fastens.demo import member_paths
from fastens.demo.data import load_digits
from fastens.evaluation import Denoiser, likelihood
from fastens.evaluation.likelihood import PROBE_DRAWS
from fastens.reference.normal import normal
from fastens.schedules import Discrete

TOLERANCE = 1e-5  # of the published scheme's RK45, absolute and relative


def published(members, schedule, x, probe, tolerance=TOLERANCE, device="cpu"):
    """scipy's RK45 on the host; drift and divergence from two evaluations; members in a loop."""
    shape, size = x.shape, x[0].numel()
    probe = probe.to(device)

    def score_mean(y, t):
        return torch.stack([member(y, t).sample for member in members]).mean(0)

    def factors(t):
        drift = float(schedule.drift(t))
        return drift, float(schedule.sigma_rate(t)) - drift * float(schedule.sigma(t))

    def derivative(t, state):
        y = torch.from_numpy(state[: -len(x)]).reshape(shape).float().to(device)
        time = torch.full((len(x),), t, device=device)
        drift, noise = factors(t)
        with torch.no_grad():
            velocity = drift * y + noise * score_mean(y, time)
        with torch.enable_grad():
            y.requires_grad_()
            inner = (score_mean(y, time) * probe).sum()
            (product,) = torch.autograd.grad(inner, y)
        divergence = drift * size + noise * (product * probe).flatten(1).sum(1)
        return np.concatenate([velocity.cpu().numpy().ravel(), divergence.cpu().numpy()])

    start = np.concatenate([x.numpy().ravel(), np.zeros(len(x))])
    span = (schedule.t_data, schedule.t_prior)
    end = torch.from_numpy(solve_ivp(derivative, span, start, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1])
    latent, gained = end[: -len(x)].reshape(shape).flatten(1), end[-len(x) :]
    log_prior = -0.5 * latent.square().sum(1) - 0.5 * size * math.log(2 * math.pi)
    return -(log_prior + gained) / (size * math.log(2))


@pytest.mark.parametrize("batch", [4])
def test_likelihood(benchmark, batch):
    ensemble, schedule = fastens.Ensemble(member_paths()), Discrete.linear()
    denoiser, members = Denoiser(ensemble, schedule), list(ensemble.members)
    spread = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    x = load_digits()[1][:batch] + spread / 8
    probe = normal(0, PROBE_DRAWS, torch.arange(batch), (1, 8, 8)).sign()

    def bits(**options):
        options = {"levels": None, "data_range": (-1.1, 1.1), "batch_size": batch, **options}
        return torch.from_numpy(likelihood(denoiser, x, **options).rows)

    contest(
        benchmark,
        lambda: bits(method="dopri5", rtol=TOLERANCE, atol=TOLERANCE),  # the published scheme's solver and tolerances
        {
            "published scheme": lambda: published(members, schedule, x, probe),
            "ours, by 24 RK4 steps": lambda: bits(method="rk4", steps=24),
        },
        bits(method="rk4", steps=96),
        1e-2,  # of the largest, about 2 bits: what either solver leaves on single rows
        "likelihood",
        f"likelihood, batch {batch}",
        f"K=5, B={batch}, 8x8, float32, one Rademacher probe",
        {"published scheme": 3},
        rounds=1,
    )
