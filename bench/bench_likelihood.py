"""Likelihood of digits under the mean of five members, against the published scheme (arXiv 2601.11444's code).

A round of the published scheme takes long; ``python -m bench.bench_likelihood DIR --only NAME`` runs one round of one
contender, adds its time to DIR, and without ``--only`` the table of all rounds there is printed.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import fastens
from bench.contest import commit, contest
from fastens.demo import member_paths
from fastens.demo.data import load_digits
from fastens.evaluation import Denoiser, likelihood
from fastens.evaluation.likelihood import PROBE_DRAWS
from fastens.files import write_json
from fastens.reference.normal import normal
from fastens.schedules import Discrete

TOLERANCE = 1e-5  # of the published scheme's RK45, absolute and relative
ERROR = 1e-2  # of the largest bits per dimension, about 2: what either solver leaves on single rows
OURS = "ours, by dopri5"  # with the published scheme's solver and tolerances


def published(members, schedule, x, probe, tolerance=TOLERANCE, device="cpu"):
    """scipy's RK45 on the host; drift and divergence from two evaluations; members in a loop."""
    shape, size = x.shape, x[0].numel()
    probe = probe.to(device)

    def score_mean(y, t):
        outputs = [member(y, t) for member in members]
        return torch.stack([getattr(output, "sample", output) for output in outputs]).mean(0)

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


class Question:
    """Contenders on one batch of digits, and the result that they are held against."""

    def __init__(self, batch):
        self.ensemble, schedule = fastens.Ensemble(member_paths()), Discrete.linear()
        self.denoiser, members = Denoiser(self.ensemble, schedule), list(self.ensemble.members)
        spread = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
        self.x = x = load_digits()[1][:batch] + spread / 8
        probe = normal(0, PROBE_DRAWS, torch.arange(batch), (1, 8, 8)).sign()
        self.warm = {OURS: lambda: self.bits(method="rk4", steps=1)}
        self.warm["published scheme"] = lambda: published(members, schedule, x, probe, 1e-1)
        self.warm["ours, by 24 RK4 steps"] = self.warm[OURS]
        self.runs = {
            OURS: lambda: self.bits(method="dopri5", rtol=TOLERANCE, atol=TOLERANCE),
            "published scheme": lambda: published(members, schedule, x, probe),
            "ours, by 24 RK4 steps": lambda: self.bits(method="rk4", steps=24),
        }

    def bits(self, **options):
        options = {"levels": None, "data_range": (-1.1, 1.1), "batch_size": len(self.x), **options}
        return torch.from_numpy(likelihood(self.denoiser, self.x, **options).rows)

    def reference(self):
        return self.bits(method="rk4", steps=96)


@pytest.mark.parametrize("batch", [4])
def test_likelihood(benchmark, batch):
    question = Question(batch)
    contest(
        benchmark,
        question.runs[OURS],
        {name: run for name, run in question.runs.items() if name != OURS},
        question.reference(),
        ERROR,
        "likelihood",
        f"likelihood, batch {batch}",
        f"K=5, B={batch}, 8x8, float32, one Rademacher probe",
        {"published scheme": 3},
        rounds=1,
    )


def main(argv=None):
    """Run one round of one contender, or print all rounds so far."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_likelihood", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the rounds")
    parser.add_argument("--batch", type=int, default=4, help="digits together")
    parser.add_argument("--only", help="run a round of this contender; its name, or the beginning of it")
    options = parser.parse_args(argv)
    path = options.out / f"likelihood_{options.batch}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if options.only is not None:
        question = Question(options.batch)
        name = next((name for name in question.runs if name.startswith(options.only)), None)
        if name is None:
            parser.error(f"--only {options.only}: expected one of {', '.join(question.runs)}")
        if kept.get("commit") != commit():
            kept = {"commit": commit(), "reference": question.reference().tolist(), "seconds": {}}
        expected = torch.tensor(kept["reference"], dtype=torch.float64)
        question.warm[name]()
        started = time.perf_counter()
        result = question.runs[name]()
        seconds = time.perf_counter() - started
        error = float((result - expected).abs().max() / expected.abs().max())
        if not error <= ERROR:
            raise SystemExit(f"{name} is {error:.1e} from the reference, so its speed means nothing")
        kept["seconds"].setdefault(name, []).append(seconds)
        write_json(path, kept)
    ours = np.median(kept.get("seconds", {}).get(OURS, [math.nan]))
    for name, seconds in kept.get("seconds", {}).items():
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        quartiles = f"{middle:.2f} s [{low:.2f}, {high:.2f}]"
        print(f"B={options.batch}  {name:24} {quartiles:26} {len(seconds)} rounds  {middle / ours:.2f} times ours")


if __name__ == "__main__":
    main()
