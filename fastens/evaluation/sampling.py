"""Samples for judging quality: sample i has its own noise, independent of batch size and interruptions."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens.distributed.jobs import from_own_place
from fastens.draws import assigned_to
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.ode import time_grid
from fastens.evaluation.progress import Progress
from fastens.evaluation.results import Parts
from fastens.ops.normal import normal


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    num: int,
    shape: tuple[int, ...],
    *,
    steps: int = 50,
    eta: float = 0.0,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    batch_size: int = 64,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool | str = False,
) -> Tensor:
    """Sample by DDIM (Song et al., "Denoising diffusion implicit models", ICLR 2021) under any schedule.

    The noise of sample i, and the members and masks that are drawn for it, are functions of the seed, i and the step.
    So samples depend neither on ``batch_size`` (beyond the rounding of the network's arithmetic) nor on interruption.

    Args:
        denoiser: the model or ensemble, with its rule, under its schedule.
        num: how many samples.
        shape: of one sample.
        steps: evaluations per sample.
        eta: 0 for the deterministic sampler, 1 for ancestral sampling.
        clip: what the predicted data is held in; none to leave it.
        batch_size: samples at a time.
        seed: of all noise.
        cache: folder in which finished batches are kept.
        progress: show a progress bar, with this text in front of it.

    Returns:
        float32 [num, *shape] on the CPU.

    Raises:
        ValueError: fewer than one sample, step or sample at a time; eta out of [0, 1].
        RuntimeError: a sample that is not finite.
    """
    if min(num, steps, batch_size) < 1 or not 0 <= eta <= 1:
        raise ValueError(
            f"num is {num}, steps {steps}, batch_size {batch_size} and eta {eta:g}, expected at least 1, 1, 1 and "
            "eta in [0, 1]"
        )
    settings = dict(steps=steps, eta=eta, clip=clip, batch_size=batch_size, seed=seed, shape=shape)
    parts = Parts.of(cache, denoiser, settings=settings)
    grid = time_grid(denoiser.schedule, steps) if denoiser.schedule.name == "edm" else _even(denoiser, steps)
    starts, batches = range(0, num, batch_size), {}
    with Progress(f"sampling by {denoiser.rule.name}", num, "sample", progress) as bar:
        for start in starts if cache is None else from_own_place(starts):
            rows = torch.arange(start, min(start + batch_size, num))
            name = f"samples_{start:07}_{len(rows)}"
            part = parts.read(name)
            if part is None:
                with _drawn(denoiser.model, rows, seed):
                    images = _trajectory(denoiser, rows, shape, grid.flip(0), eta, clip, seed)
                if not torch.isfinite(images).all():
                    raise RuntimeError(f"samples {start} to {int(rows[-1])} are not finite under {denoiser.rule}")
                part = {"samples": images.numpy()}
                parts.write(name, part)
            batches[start] = part["samples"]
            bar.update(len(rows))
    return torch.from_numpy(np.concatenate([batches[start] for start in starts]))


def _even(denoiser: Denoiser, steps: int) -> Tensor:
    schedule = denoiser.schedule
    return torch.linspace(schedule.t_data, schedule.t_prior, steps + 1, dtype=torch.float64)


def _trajectory(
    denoiser: Denoiser,
    rows: Tensor,
    shape: tuple[int, ...],
    times: Tensor,
    eta: float,
    clip: tuple[float, float] | None,
    seed: int,
) -> Tensor:
    schedule, device = denoiser.schedule, denoiser.device
    number = rows.to(device)
    x = clean = schedule.prior_std * normal(seed, 0, number, shape)
    for step, (now, then) in enumerate(itertools.pairwise(times.to(device))):
        predicted = denoiser.at(x, now)
        (alpha, sigma), (alpha_next, sigma_next) = (schedule.coefficients(t, x) for t in (now, then))
        clean = denoiser.to("x0", predicted, x, now)  # finite for v where there is no data at all
        epsilon = denoiser.to_epsilon(predicted, x, now)
        if clip is not None:
            clean = clean.clamp(*clip)
            epsilon = (x - alpha * clean) / sigma
        # the noise of the posterior of x at the next time, given x now and the data
        remaining = 1 - (alpha * sigma_next / (alpha_next * sigma)).square()
        fresh = eta * sigma_next * remaining.clamp_min(0).sqrt()
        kept = (sigma_next.square() - fresh.square()).clamp_min(0).sqrt()
        x = alpha_next * clean + kept * epsilon
        if eta > 0:
            x = x + fresh * normal(seed, step + 1, number, shape)
    return clean.cpu() if clip is not None else x.cpu()


def _drawn(model: Any, rows: Tensor, seed: int) -> contextlib.AbstractContextManager[None]:
    """The run of these samples, by whose numbers members and masks are drawn where rows have no members."""
    scope = getattr(model, "trajectory", None)
    if scope is None or assigned_to(model) is not None:
        return contextlib.nullcontext()
    return scope(len(rows), seed, samples=rows)
