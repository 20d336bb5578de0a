"""Products, powers and guidance of densities that are known: what a sum of scores samples, and what corrects it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastens.composition.superpose import Superposed, superpose
from fastens.ensemble import Ensemble
from fastens.evaluation.denoiser import Denoiser
from fastens.rules import Product
from fastens.schedules import VP, Schedule

SIZES = (2, 8, 32)
BINS = 40  # of equal probability, along the axis in which the modes differ
EXACT = 200_000  # samples of the truth, by which its moments and quantiles are taken
WAYS = {
    "naive": {},
    "weights": {"start": 20.0, "resample": 0.5},
    "MALA": {"start": 20.0, "corrector": "mala"},
    "both": {"start": 20.0, "resample": 0.5, "corrector": "mala"},
}


class Mixture(nn.Module):
    """The exact noise prediction for data from a mixture of Gaussians of one deviation, ``sum_m w_m N(mu_m, std^2)``.

    Args:
        schedule: of the noise.
        means: [M, D].
        std: of each component.
        weights: of the components, M numbers that sum to 1; none for equal ones.
    """

    def __init__(self, schedule: Schedule, means: Tensor, std: float, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.means = nn.Parameter(means.double())
        self.variance = nn.Parameter(torch.tensor(std**2, dtype=torch.float64))
        shares = weights or [1 / len(means)] * len(means)
        self.logits = nn.Parameter(torch.tensor(shares, dtype=torch.float64).log())

    def _responsible(self, x: Tensor, alpha: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised log-densities of x under each component [B, M], and what a Gaussian's constant lacks [B]."""
        centres = alpha * self.means
        products = x @ centres.mT - 0.5 * centres.square().sum(1)
        return self.logits + products / variance, -0.5 * x.square().sum(1) / variance

    def forward(self, x: Tensor, network_time: Tensor) -> Tensor:
        """The noise in x [B, D] at one time, which all rows share."""
        t = self.schedule.time(network_time)[0]
        alpha, sigma = self.schedule.alpha(t).to(x), self.schedule.sigma(t).to(x)
        variance = alpha**2 * self.variance + sigma**2
        shares = self._responsible(x, alpha, variance)[0].softmax(1)
        return sigma * (x - shares @ (alpha * self.means)) / variance

    @torch.no_grad()
    def log_density(self, x: Tensor) -> Tensor:
        """The log density [B] of the data with the schedule's least noise, not of the data themselves."""
        t = self.schedule.t_data
        alpha, variance = (
            self.schedule.alpha(t),
            self.schedule.alpha(t) ** 2 * self.variance + self.schedule.sigma(t) ** 2,
        )
        parts, common = self._responsible(x.double(), alpha, variance)
        return parts.logsumexp(1) + common - 0.5 * x.shape[1] * torch.log(2 * math.pi * variance)


@dataclasses.dataclass(frozen=True)
class Case:
    """A composition, and how its truth is sampled.

    Attributes:
        name: for people.
        members: of a size D.
        weights: of the product.
        exact: draws samples of the truth [n, D].
    """

    name: str
    members: Callable[[int], list[Mixture]]
    weights: tuple[float, ...]
    exact: Callable[[int, int, torch.Generator], Tensor]

    def denoiser(self, size: int) -> Denoiser:
        """The ensemble of the members under the product."""
        members = self.members(size)
        return Denoiser(Ensemble(members, Product(self.weights), prediction="epsilon", schedule=members[0].schedule))


SCHEDULE = VP()


def _axis(size: int, *values: float) -> Tensor:
    """Points [M, D] on the first axis."""
    points = torch.zeros(len(values), size, dtype=torch.float64)
    points[:, 0] = torch.tensor(values, dtype=torch.float64)
    return points


def _of_gaussians(
    components: Sequence[tuple[Tensor, float]], weights: Sequence[float]
) -> Callable[[int, torch.Generator], Tensor]:
    """Samples of a product of Gaussians N(mean, std^2), to powers."""
    precision = sum(w / std**2 for (_, std), w in zip(components, weights, strict=True))
    means = [w / std**2 * m for (m, std), w in zip(components, weights, strict=True)]
    mean = torch.stack(means).sum(0) / precision

    def drawn(num: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(num, mean.shape[-1], dtype=torch.float64, generator=generator)
        return mean + noise / math.sqrt(precision)

    return drawn


def _along_an_axis(
    log_density: Callable[[Tensor], Tensor], deviation: float, num: int, size: int, generator: torch.Generator
) -> Tensor:
    """Samples whose first coordinate has a density on a line, by inversion, and whose others are normal."""
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    logs = log_density(grid)
    cumulative = (logs - logs.max()).exp().cumsum(0)
    cumulative = cumulative / cumulative[-1]
    x = deviation * torch.randn(num, size, dtype=torch.float64, generator=generator)
    uniform = torch.rand(num, dtype=torch.float64, generator=generator)
    x[:, 0] = grid[torch.searchsorted(cumulative, uniform).clamp_max(len(grid) - 1)]
    return x


def _line(grid: Tensor, centres: Sequence[float], std: float, weights: Sequence[float]) -> Tensor:
    """The log-density of a mixture on a line, up to a constant."""
    parts = [math.log(w) - 0.5 * ((grid - c) / std) ** 2 for c, w in zip(centres, weights, strict=True)]
    return torch.stack(parts).logsumexp(0)


def _offset(size: int) -> Tensor:
    """Two modes on the first axis, of which the second is moved along the other axes."""
    points = _axis(size, -3.0, 3.0)
    points[1, 1] = 1.2
    return points


def _product_of_mixtures(num: int, size: int, generator: torch.Generator) -> Tensor:
    first, second, std = _axis(size, -3.0, 3.0), _offset(size), 0.6
    logits = -(first[:, None] - second[None]).square().sum(-1) / (4 * std**2)  # [2, 2], of pairs of components
    which = torch.multinomial(logits.flatten().softmax(0), num, replacement=True, generator=generator)
    centres = (first[which // 2] + second[which % 2]) / 2
    noise = torch.randn(num, size, dtype=torch.float64, generator=generator)
    return centres + noise * std / math.sqrt(2)


CASES = (
    Case(
        "product of Gaussians",
        lambda d: [Mixture(SCHEDULE, _axis(d, -0.6), 0.8), Mixture(SCHEDULE, _axis(d, 1.0), 0.8)],
        (1.0, 1.0),
        lambda n, d, g: _of_gaussians([(_axis(d, -0.6), 0.8), (_axis(d, 1.0), 0.8)], (1.0, 1.0))(n, g),
    ),
    Case(
        "power 3 of a Gaussian",
        lambda d: [Mixture(SCHEDULE, _axis(d, 0.6), 1.0)],
        (3.0,),
        lambda n, d, g: _of_gaussians([(_axis(d, 0.6), 1.0)], (3.0,))(n, g),
    ),
    Case(
        "guidance 2.5 of Gaussians",
        lambda d: [Mixture(SCHEDULE, _axis(d, 0.8), 0.8), Mixture(SCHEDULE, _axis(d, 0.0), 1.2)],
        (2.5, -1.5),
        lambda n, d, g: _of_gaussians([(_axis(d, 0.8), 0.8), (_axis(d, 0.0), 1.2)], (2.5, -1.5))(n, g),
    ),
    Case(
        "product of mixtures",
        lambda d: [Mixture(SCHEDULE, _axis(d, -3.0, 3.0), 0.6), Mixture(SCHEDULE, _offset(d), 0.6)],
        (1.0, 1.0),
        _product_of_mixtures,
    ),
    Case(
        "power 2 of a mixture",
        lambda d: [Mixture(SCHEDULE, _axis(d, -2.5, 2.5), 0.7, (0.7, 0.3))],
        (2.0,),
        lambda n, d, g: _along_an_axis(
            lambda x: 2 * _line(x, (-2.5, 2.5), 0.7, (0.7, 0.3)), 0.7 / math.sqrt(2), n, d, g
        ),
    ),
    Case(
        "guidance 3 in a mixture",
        lambda d: [Mixture(SCHEDULE, _axis(d, 1.0, 1.0), 1.0), Mixture(SCHEDULE, _axis(d, -1.0, 1.0), 1.0)],
        (3.0, -2.0),
        lambda n, d, g: _along_an_axis(
            lambda x: 3 * _line(x, (1.0,), 1.0, (1.0,)) - 2 * _line(x, (-1.0, 1.0), 1.0, (0.5, 0.5)), 1.0, n, d, g
        ),
    ),
)


class Truth:
    """A case's true distribution, by quantiles along the first axis and moments along the others.

    Args:
        case: the composition.
        size: D.
    """

    def __init__(self, case: Case, size: int) -> None:
        self._case, self._size = case, size
        drawn = case.exact(EXACT, size, torch.Generator().manual_seed(1))
        at = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
        self._edges = torch.quantile(drawn[:, 0], at)
        rest = drawn[:, 1:]
        self._mean, covariance = rest.mean(0), torch.atleast_2d(torch.cov(rest.T))
        self._precision, self._log_determinant = covariance.inverse(), covariance.logdet()

    def divergence(self, samples: Tensor) -> float:
        """KL divergences in nats, added: along the first axis by counts, of the others by Gaussians of the moments."""
        x = samples.double()
        counts = torch.bincount(torch.bucketize(x[:, 0].contiguous(), self._edges), minlength=BINS) + 0.5
        first = float(-(BINS * counts / counts.sum()).log().mean())
        rest = x[:, 1:]
        covariance, gap = torch.atleast_2d(torch.cov(rest.T)), rest.mean(0) - self._mean
        trace = (self._precision @ covariance).trace() - len(gap)
        return first + 0.5 * float(trace + gap @ self._precision @ gap - covariance.logdet() + self._log_determinant)

    def floor(self, num: int) -> float:
        """What as many samples of the truth have, on average: a divergence from finite samples is not zero."""
        draws = [self._case.exact(num, self._size, torch.Generator().manual_seed(seed)) for seed in range(2, 12)]
        return sum(map(self.divergence, draws)) / len(draws)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one way gave in one case.

    Attributes:
        case: its name.
        size: D.
        way: one of WAYS.
        error: KL divergence above that of as many exact samples, in nats; the mean over seeds.
        spread: standard error of that, none of one.
        effective: the least effective sample size on the way, a share.
        seconds: of one run.
    """

    case: str
    size: int
    way: str
    error: float
    spread: float | None
    effective: float
    seconds: float


def study(num: int = 4096, steps: int = 200, seeds: int = 2, sizes: Sequence[int] = SIZES) -> Iterator[Result]:
    """Run every way in every case."""
    for case in CASES:
        for size in sizes:
            truth, denoiser = Truth(case, size), case.denoiser(size)
            floor = truth.floor(num)
            for way, options in WAYS.items():
                errors, effective, begun = [], 1.0, time.perf_counter()
                for seed in range(seeds):
                    found: Superposed = superpose(denoiser, num, (size,), steps=steps, seed=seed, **options)
                    errors.append(truth.divergence(found.samples) - floor)
                    effective = min(effective, *found.effective)
                seconds = (time.perf_counter() - begun) / seeds
                values = torch.tensor(errors, dtype=torch.float64)
                spread = float(values.std() / math.sqrt(seeds)) if seeds > 1 else None
                yield Result(case.name, size, way, float(values.mean()), spread, effective, seconds)
