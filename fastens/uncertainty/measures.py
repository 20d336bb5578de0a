"""Measures of uncertainty, each with its equation and source: arrays in, arrays out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # a tensor, or what NumPy makes an array of
DISTANCES = ("wasserstein", "kl", "bhattacharyya")


class Variances(NamedTuple):
    """Parts of the variance of samples, each [...]; epistemic and aleatoric add up to total."""

    epistemic: Array
    aleatoric: Array
    total: Array


class SpreadSkill(NamedTuple):
    """How far samples are from their mean, and their mean from the truth; equal where all are of one distribution."""

    spread: float
    skill: float


class Sparsification(NamedTuple):
    """What error is left when the most uncertain elements are removed.

    Attributes:
        fractions: removed, [n], from 0 to below 1.
        by_uncertainty: mean error of the rest, over that of all, [n].
        by_error: likewise, removed by the error itself: no uncertainty does better.
        ause: the area between the two.
    """

    fractions: Array
    by_uncertainty: Array
    by_error: Array
    ause: float


class Calibration(NamedTuple):
    """How many truths are in intervals that should hold so many.

    Attributes:
        levels: that intervals should hold, [n].
        coverage: that they hold, [n].
        error: mean of the absolute difference.
    """

    levels: Array
    coverage: Array
    error: float


def _read(name: str, value: Array, least_dims: int = 0) -> Tensor:
    x = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.require(value, requirements=("C", "W")))
    if x.dtype is torch.bool or x.is_complex():
        raise TypeError(f"{name} is {x.dtype}, expected real numbers")
    if x.ndim < least_dims or not x.numel():
        axes = ", ".join("KN"[:least_dims]) if name == "samples" and least_dims == 2 else "M"
        raise ValueError(f"{name} is {list(x.shape)}, expected [{axes}, ...] with at least one sample")
    return x.double()


def _like(value: Array, *found: Tensor) -> Any:
    made = found if isinstance(value, Tensor) else tuple(x.cpu().numpy() for x in found)
    return made[0] if len(made) == 1 else made


def _pooled(samples: Array, truth: Array, least: int = 1) -> tuple[Tensor, Tensor]:
    x, y = _read("samples", samples, 1), _read("truth", truth)
    if x.shape[1:] != y.shape:
        raise ValueError(f"truth is {list(y.shape)}, expected {list(x.shape[1:])}, as each of the samples")
    if len(x) < least:
        raise ValueError(f"samples is {list(x.shape)}, expected at least {least} of them")
    return x, y.to(x.device)


def _check_ordered(**given: Tensor) -> None:
    """Raise where a value has no place among others: compared, NaN would count as the smallest, or as outside."""
    for name, x in given.items():
        if lost := int(x.isnan().sum()):
            raise ValueError(f"{name} is NaN in {lost} of {x.numel()} elements, which has no rank: leave those out")


def decompose(samples: Array, unbiased: bool = False) -> Variances:
    """Split the variance of samples into that between members and that within them: the law of total variance.

    Var[x] = Var_k[E[x | k]] + E_k[Var[x | k]]: the first is epistemic, what members disagree about, the second
    aleatoric (Depeweg et al., "Decomposition of uncertainty in Bayesian deep learning", ICML 2018, arXiv 1710.07283).
    Variances are normalised by K and N, so that both add up to the variance of all K N samples. A member's mean of N
    samples strays by itself: ``unbiased`` takes Var_k with K - 1, Var with N - 1, and 1/N of the second from the first,
    as in the analysis of variance with random effects (Searle, Casella, McCulloch, "Variance components", 1992); it may
    then be below zero. Samples from shared noise stray together, and need no such correction.

    Args:
        samples: [K, N, ...].
        unbiased: estimate the variances of more members and samples than there are.

    Raises:
        ValueError: no samples; ``unbiased`` of one member, or one sample each.
        TypeError: no real numbers.
    """
    x = _read("samples", samples, 2)
    if unbiased and min(x.shape[:2]) < 2:
        raise ValueError(f"samples is {list(x.shape)}, expected at least two members and two samples each for unbiased")
    count = int(unbiased)
    aleatoric = x.var(1, correction=count).mean(0)
    epistemic = x.mean(1).var(0, correction=count)
    if unbiased:
        epistemic = epistemic - aleatoric / x.shape[1]
    return Variances(*_like(samples, epistemic, aleatoric, epistemic + aleatoric))


def distances(means: Array, variances: Array, kind: str = "wasserstein") -> Array:
    """Distances between the members' Gaussian predictions, element by element; of whole predictions they add up.

    ``"wasserstein"``: W^2 = (m_i - m_j)^2 + (s_i - s_j)^2, the square of the 2-Wasserstein distance (Dowson and Landau,
    1982). ``"kl"``: KL(i || j) = log(s_j / s_i) + (s_i^2 + (m_i - m_j)^2) / (2 s_j^2) - 1/2. ``"bhattacharyya"``:
    (m_i - m_j)^2 / (4 (s_i^2 + s_j^2)) + log((s_i^2 + s_j^2) / (2 s_i s_j)) / 2 (Bhattacharyya, 1943). Where variances
    are 0, or all equal, as of a deterministic sampler, only the first is finite and of use.

    Args:
        means: m, [K, ...].
        variances: s^2, [K, ...], or what broadcasts to it.
        kind: one of DISTANCES.

    Returns:
        [K, K, ...]; entry i, j is from i to j.

    Raises:
        ValueError: an unknown kind, or variances below zero; of 0, where they are divided by.
    """
    if kind not in DISTANCES:
        raise ValueError(f"kind {kind!r} is unknown, expected one of {', '.join(map(repr, DISTANCES))}")
    m = _read("means", means, 1)
    v = _read("variances", variances).to(m.device).expand_as(m)
    if (v < 0).any() or (kind != "wasserstein" and (v == 0).any()):
        raise ValueError(f"variances has values {'below' if (v < 0).any() else 'of'} zero; kind {kind!r} takes none")
    square = (m[:, None] - m[None]).square()
    here, there = v[:, None], v[None]
    if kind == "wasserstein":
        found = square + (here.sqrt() - there.sqrt()).square()
    elif kind == "kl":
        found = (there / here).log() / 2 + (here + square) / (2 * there) - 0.5
    else:
        found = square / (4 * (here + there)) + ((here + there) / (2 * (here * there).sqrt())).log() / 2
    return _like(means, found)


def disagreement(pairwise: Array) -> Array:
    """The members' mutual information by their distances: -1/K sum_i log(1/K sum_j exp(-D_ij)).

    0 where all agree, log K at most (Kolchinsky and Tracey, "Estimating mixture entropy with pairwise distances", 2017,
    arXiv 1706.02419; of ensembles Berry and Meger, arXiv 2305.13498). Give it distances of whole predictions.

    Args:
        pairwise: D, [K, K, ...].

    Returns:
        [...].

    Raises:
        ValueError: another shape.
    """
    d = _read("pairwise", pairwise, 2)
    if d.shape[0] != d.shape[1]:
        raise ValueError(f"pairwise is {list(d.shape)}, expected [K, K, ...]")
    return _like(pairwise, -((-d).logsumexp(1) - np.log(len(d))).mean(0))


def crps(samples: Array, truth: Array, fair: bool = True) -> Array:
    """The continuous ranked probability score, element by element: lower is better; of one sample it is |x - y|.

    1/M sum_i |x_i - y| - 1/(2 c) sum_ij |x_i - x_j|, c = M (M - 1) for the fair score, whose mean does not depend on
    M, and c = M^2 for the standard one (Gneiting and Raftery, 2007; fair: Ferro, 2014). Sorted, the second sum is
    2 sum_i (2 i - M - 1) x_(i).

    Args:
        samples: [M, ...].
        truth: y, [...].
        fair: of the distribution that the samples are from; else of the samples themselves.

    Raises:
        ValueError: shapes that do not fit; one sample for the fair score.
    """
    x, y = _pooled(samples, truth, 2 if fair else 1)
    count = len(x)
    ranks = 2 * torch.arange(1, count + 1, dtype=x.dtype, device=x.device) - count - 1
    gaps = torch.tensordot(ranks, x.sort(0).values, 1)  # half the sum over pairs
    return _like(samples, (x - y).abs().mean(0) - gaps / (count * (count - 1) if fair else count**2))


def spread_skill(samples: Array, truth: Array) -> SpreadSkill:
    """Spread sqrt((M + 1) / M mean s^2), with s^2 by M - 1, beside the root mean square error of the samples' mean.

    Where truth and samples are from one distribution both are the same on average (Fortin et al., "Why should ensemble
    spread match the RMSE of the ensemble mean?", 2014).

    Args:
        samples: [M, ...].
        truth: [...].

    Raises:
        ValueError: shapes that do not fit, or one sample.
    """
    x, y = _pooled(samples, truth, 2)
    spread = (x.var(0).mean() * (len(x) + 1) / len(x)).sqrt()
    return SpreadSkill(float(spread), float((x.mean(0) - y).square().mean().sqrt()))


def rank_histogram(samples: Array, truth: Array, seed: int = 0) -> Array:
    """How often the truth has each rank among the samples, [M + 1]: flat where they are from one distribution.

    A U says too little spread, a hill too much, a slope a bias (Hamill, "Interpretation of rank histograms", 2001).
    Where samples equal the truth its rank is drawn among theirs.

    Args:
        samples: [M, ...].
        truth: [...].
        seed: of those draws.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    x, y = _pooled(samples, truth)
    _check_ordered(samples=x, truth=y)
    below, equal = (x < y).sum(0), (x == y).sum(0)
    at = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype).to(y.device)
    rank = below + (at * (equal + 1)).floor().long()
    return _like(samples, torch.bincount(rank.flatten(), minlength=len(x) + 1))


def sparsification(error: Array, uncertainty: Array, steps: int = 20) -> Sparsification:
    """Remove the most uncertain elements first: does the error of the rest fall as if the worst had been removed?

    AUSE is the area between the curve by uncertainty and that by the error itself, both over the error of all (Ilg et
    al., "Uncertainty estimates and multi-hypotheses networks for optical flow", ECCV 2018, arXiv 1802.07095): 0 is an
    uncertainty that ranks as the error does. Of elements that are equally uncertain any is as likely to be removed: the
    curve is its mean over their orders, flat where the uncertainty is the same everywhere.

    Args:
        error: of each element, none below zero.
        uncertainty: of each element, of the same shape.
        steps: points of the curves.

    Raises:
        ValueError: shapes that differ, errors below zero or all zero, NaN, no steps.
    """
    e, u = _read("error", error).flatten(), _read("uncertainty", uncertainty)
    if u.numel() != e.numel() or tuple(u.shape) != tuple(np.shape(error)):
        raise ValueError(f"uncertainty is {list(u.shape)}, expected {list(np.shape(error))}, as error")
    _check_ordered(error=e, uncertainty=u)
    if steps < 1 or (e < 0).any() or not e.sum() > 0:
        raise ValueError(f"expected at least one step, and errors of which none is below and some above zero; {steps=}")
    fractions = torch.arange(steps, dtype=e.dtype) / steps
    kept = len(e) - (torch.arange(steps, device=e.device) * len(e)).div(steps, rounding_mode="floor")

    def curve(rank: Tensor) -> Tensor:
        _, group, sizes = rank.unique(return_inverse=True, return_counts=True)  # those that share a rank
        alike = torch.zeros(len(sizes), dtype=e.dtype, device=e.device).index_add_(0, group, e) / sizes
        return alike.repeat_interleave(sizes).cumsum(0)[kept - 1] / kept / e.mean()

    mine, best = curve(u.flatten().to(e.device)), curve(e)
    ause = float(torch.trapezoid(mine - best, fractions.to(e.device)))
    fractions, mine, best = _like(error, fractions, mine, best)
    return Sparsification(fractions, mine, best, ause)


def calibration(samples: Array, truth: Array, levels: Array = None) -> Calibration:
    """How many truths are in the central intervals of the samples that should hold ``levels`` of them.

    The interval of level p is between the quantiles (1 - p)/2 and (1 + p)/2 of M samples, of which value i is that of
    (i - 1/2) / M; the error is the mean of |coverage - p| (Kuleshov et al., "Accurate uncertainties for deep learning
    using calibrated regression", ICML 2018, arXiv 1807.00263).

    Args:
        samples: [M, ...].
        truth: [...].
        levels: p, [n], within 0 and 1; none for 0.1, 0.2, ..., 0.9.

    Raises:
        ValueError: shapes that do not fit, one sample, levels out of range, NaN.
    """
    x, y = _pooled(samples, truth, 2)
    _check_ordered(samples=x, truth=y)
    p = _read("levels", np.arange(1, 10) / 10 if levels is None else levels).flatten().to(x.device)
    if not ((p > 0) & (p < 1)).all():
        raise ValueError(f"levels are {p.tolist()}, expected numbers above 0 and below 1")
    sides = torch.cat([(1 - p) / 2, (1 + p) / 2])
    place = (sides * len(x) - 0.5).clamp(0, len(x) - 1)  # between which values a quantile is
    ordered, low = x.sort(0).values, place.floor().long()
    part = (place - low).reshape(-1, *(1,) * y.ndim)
    found = ordered[low].lerp(ordered[(low + 1).clamp_max(len(x) - 1)], part)
    lower, upper = found.chunk(2)
    coverage = ((lower <= y) & (y <= upper)).double().reshape(len(p), -1).mean(1)
    apart = float((coverage - p).abs().mean())
    p, coverage = _like(samples, p, coverage)
    return Calibration(p, coverage, apart)
