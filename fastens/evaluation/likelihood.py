"""Likelihood by the probability-flow ODE, in bits per dimension."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens.distributed.jobs import from_own_place
from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.ode import AugmentedFlow, integrate
from fastens.evaluation.progress import Progress
from fastens.evaluation.results import Parts
from fastens.ops.normal import normal

DIVERGENCES = ("rademacher", "gaussian", "exact")
DEQUANTISATIONS = ("uniform", "gaussian", "none")
PROBE_DRAWS, DEQUANTISATION_DRAWS = 1 << 20, 1 << 21  # draws of a sample that are not those of other uses


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Log-densities of samples.

    Attributes:
        bits_per_dim: of each repeat and sample, [R, N].
        evaluations: forward passes of each batch, all repeats in turn.
        seconds: of computing; parts read from an earlier run count with their time then.
    """

    bits_per_dim: np.ndarray
    evaluations: list[int]
    seconds: float

    @property
    def rows(self) -> np.ndarray:
        """Bits per dimension of each sample, the mean over repeats, [N]."""
        return self.bits_per_dim.mean(0)

    @property
    def mean(self) -> float:
        """Bits per dimension, the mean over samples."""
        return float(self.rows.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over samples."""
        return float(self.rows.std(ddof=1) / math.sqrt(len(self.rows))) if len(self.rows) > 1 else math.nan

    def summary(self) -> str:
        """The mean over samples, in a sentence."""
        passes = sum(self.evaluations)
        return f"{self.mean:.4f} ± {self.error:.4f} bits/dim over {len(self.rows)} samples, in {passes} evaluations"

    def to_frame(self) -> Any:
        """A pandas table: a row for each sample, a column for each repeat."""
        import pandas as pd

        return pd.DataFrame(self.bits_per_dim.T, columns=[f"repeat {r}" for r in range(len(self.bits_per_dim))])

    def plot(self, axis: Any = None) -> Any:
        """Draw a histogram of the samples' bits per dimension; the axes are returned."""
        import matplotlib.pyplot as plt

        axis = plt.subplots()[1] if axis is None else axis
        axis.hist(self.rows, bins="auto")
        axis.axvline(self.mean, color="black", linestyle="--", linewidth=1)
        axis.set(xlabel="bits/dim", ylabel="samples")
        return axis


def bits_offset(data_range: tuple[float, float], levels: int) -> float:
    """What is added to ``-log2 p(x) / D`` for data whose ``levels`` values are equally spaced over ``data_range``.

    It is ``-log2`` of the distance between two values, so that the density's volume is counted in quantisation cells:
    7 for values ``2 i / 256 - 1``; 6.994 for ``2 i / 255 - 1``, where both ends are values.
    """
    return -math.log2((data_range[1] - data_range[0]) / (levels - 1))


def likelihood(
    denoiser: Denoiser,
    data: Tensor,
    *,
    levels: int | None = 256,
    data_range: tuple[float, float] = (-1.0, 1.0),
    dequantisation: str = "uniform",
    repeats: int = 1,
    divergence: str = "rademacher",
    num_probes: int = 1,
    method: str = "dopri5",
    steps: int = 32,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool | str = False,
) -> Likelihood:
    """Compute ``log p(x)`` by integrating from data to prior (Song et al., ICLR 2021) and return bits per dimension.

    Quantised data are points of a lattice. ``"uniform"`` spreads each over its cell, which bounds their probability
    from below; ``"gaussian"`` spreads it by the schedule's noise at ``t_data``, as the model was trained, and takes off
    that noise's entropy (Zheng et al., "Improved techniques for maximum likelihood estimation for diffusion ODEs", ICML
    2023); it is a bound where the noise at ``t_data`` stays within the cell.

    Args:
        denoiser: the model or ensemble, with its rule, under its schedule.
        data: [N, ...] in ``data_range``, of the dtype that the model takes; the ODE is solved in float32 at least.
        levels: how many equally spaced values the data takes; none for data with a density (no dequantisation).
        data_range: least and greatest value of the data.
        dequantisation: ``"uniform"``, ``"gaussian"`` or ``"none"``.
        repeats: dequantisations, each with its own probes.
        divergence: ``"rademacher"`` or ``"gaussian"`` probes, or ``"exact"`` (D products per evaluation).
        num_probes: probes per sample, averaged.
        method: a method of torchdiffeq: adaptive (``"dopri5"``, ...) or of fixed steps (``"rk4"``, ``"heun2"``, ...).
        steps: of a fixed-step method.
        rtol: tolerance of an adaptive method, on the root mean square over the batch.
        atol: as ``rtol``.
        batch_size: samples integrated together.
        seed: of dequantisation and probes; each sample has its own noise.
        cache: folder in which finished batches are kept, so that an interrupted run goes on.
        progress: show a progress bar, with this text in front of it.

    Raises:
        TypeError: data that is no floating-point tensor.
        ValueError: data out of range; an unknown method, divergence or dequantisation; a field that is not a function
            of its input, because the rule draws members or the model draws dropout masks; the exact divergence where
            the rule mixes the rows of a batch.
        RuntimeError: an adaptive method that finds no small enough step.
    """
    check_data("data", data, *data_range)
    _check(denoiser, levels, divergence, dequantisation, repeats, num_probes, batch_size)
    settings = dict(
        levels=levels,
        data_range=data_range,
        dequantisation=dequantisation,
        divergence=divergence,
        num_probes=num_probes,
        method=method,
        steps=steps,
        rtol=rtol,
        atol=atol,
        batch_size=batch_size,
        seed=seed,
    )
    parts = Parts.of(cache, denoiser, data=data, settings=settings)
    _check_deterministic(denoiser, data)
    bits, seconds = np.empty((repeats, len(data))), 0.0
    pieces = [(repeat, start) for repeat in range(repeats) for start in range(0, len(data), batch_size)]
    evaluations: dict[tuple[int, int], int] = {}
    with Progress("likelihood", repeats * len(data), "sample", progress) as bar:
        for repeat, start in pieces if cache is None else from_own_place(pieces):
            rows = torch.arange(start, min(start + batch_size, len(data)))
            name = f"repeat_{repeat}_rows_{start:07}"
            part = parts.read(name)
            if part is None:
                begun = time.perf_counter()
                values, used = _batch(denoiser, data[rows], rows, repeat, settings)
                took = time.perf_counter() - begun
                part = {"bits": values, "evaluations": np.array(used), "seconds": np.array(took)}
                parts.write(name, part)
            bits[repeat, start : start + len(rows)] = part["bits"]
            evaluations[repeat, start] = int(part["evaluations"])
            seconds += float(part["seconds"])
            bar.update(len(rows), evaluations=evaluations[repeat, start])
    return Likelihood(bits, [evaluations[piece] for piece in pieces], seconds)


def _batch(denoiser: Denoiser, data: Tensor, rows: Tensor, repeat: int, settings: dict) -> tuple[np.ndarray, int]:
    """Bits per dimension of a batch, and the forward passes that it took."""
    schedule, seed, shape = denoiser.schedule, settings["seed"], tuple(data.shape[1:])
    size = math.prod(shape)
    wide = torch.promote_types(data.dtype, torch.float32)
    given, data, bits = data.dtype, data.to(wide), 0.0
    x = data
    levels, dequantisation = settings["levels"], settings["dequantisation"]
    low, high = settings["data_range"]
    if levels is not None and dequantisation != "none":
        noise = normal(seed, DEQUANTISATION_DRAWS + repeat, rows, shape).to(data.dtype)
        if dequantisation == "uniform":
            # the normal's distribution function makes it uniform; cells are centred on the values
            x = data + (torch.special.ndtr(noise) - 0.5) * (high - low) / (levels - 1)
            bits = bits_offset((low, high), levels)
        else:
            alpha, sigma = schedule.coefficients(schedule.t_data, data)
            x = alpha * data + sigma * noise
            bits = -0.5 * math.log2(2 * math.pi * math.e) - float(sigma.log2())
    elif levels is not None:
        bits = bits_offset((low, high), levels)
    probes = None
    if settings["divergence"] != "exact":
        number = settings["num_probes"]
        drawn = [normal(seed, PROBE_DRAWS + repeat * number + i, rows, shape) for i in range(number)]
        probes = torch.stack(drawn).to(denoiser.device, given)
        probes = probes.sign() if settings["divergence"] == "rademacher" else probes
    flow = AugmentedFlow(denoiser, probes, given)
    x = x.to(denoiser.device)
    start = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    solver = (settings["method"], settings["steps"], settings["rtol"], settings["atol"])
    latent, gained = integrate(flow, start, schedule, *solver)
    scaled = latent.double() / schedule.prior_std
    log_prior = -0.5 * scaled.square().flatten(1).sum(1) - size * math.log(schedule.prior_std * math.sqrt(2 * math.pi))
    log_density = log_prior + gained.double()
    if not torch.isfinite(log_density).all():
        raise RuntimeError(f"log-density of sample {int(rows[(~log_density.isfinite()).nonzero()[0]])} is not finite")
    return (-log_density / (size * math.log(2)) + bits).cpu().numpy(), flow.evaluations


def _check(
    denoiser: Denoiser,
    levels: int | None,
    divergence: str,
    dequantisation: str,
    repeats: int,
    num_probes: int,
    batch_size: int,
) -> None:
    if denoiser.rule.random:
        raise ValueError(
            f"rule {denoiser.rule.name!r} draws members at random, so its field has no likelihood by an ODE solver; "
            "take a rule that is a function of the scores, such as 'mean'"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if dequantisation not in DEQUANTISATIONS:
        raise ValueError(f"dequantisation: expected one of {', '.join(DEQUANTISATIONS)}, got {dequantisation!r}")
    if divergence == "exact" and batch_size > 1 and getattr(denoiser.rule, "shift", "") == "batch":
        raise ValueError(
            "the rule shifts by the minimum over the batch, so that rows depend on each other, which the exact "
            "divergence leaves out: take shift='sample', batch_size=1 or probes"
        )
    if levels is not None and levels < 2:
        raise ValueError(f"levels is {levels}, expected at least 2, or None for data with a density")
    if min(repeats, num_probes, batch_size) < 1:
        raise ValueError(
            f"repeats is {repeats}, num_probes {num_probes} and batch_size {batch_size}, expected at least 1 of each"
        )


def _check_deterministic(denoiser: Denoiser, like: Tensor) -> None:
    """Evaluate twice; random masks give two results, and a solver would integrate neither."""
    t = torch.tensor(0.5 * (denoiser.schedule.t_data + denoiser.schedule.t_prior), dtype=torch.float64)
    x = normal(0, 0, torch.arange(8), tuple(like.shape[1:])).to(denoiser.device, like.dtype)
    with torch.no_grad():
        first, second = (denoiser.epsilon(x, t) for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "the model gives two results for one input, so its field has no likelihood by an ODE solver; put it in "
            "evaluation mode (model.eval()), or take MC Dropout with masks='fixed'"
        )
