"""The best weights of a mean: its loss is quadratic in them, so they come in closed form from the members' errors."""

from __future__ import annotations

import numpy as np

from fastens.evaluation.loss import DenoisingLoss, Estimate
from fastens.rules import NoiseDependentMean

CONSTRAINTS = ("simplex", "affine")


def fit_weights(loss: DenoisingLoss, *, constraint: str = "simplex", ridge: float = 0.0) -> NoiseDependentMean:
    """Fit the weights of least loss at every noise level: a rule for ensembles that have a schedule.

    The loss of a weighted mean is ``w^T G w``, with G the Gram matrix of the members' errors. Under ``sum w = 1``
    ("affine") the minimum is ``G^-1 1 / (1^T G^-1 1)``; with ``w >= 0`` besides ("simplex") an active set finds it.

    Args:
        loss: of the members, on rows to fit on; see :func:`denoising_loss`.
        constraint: ``"simplex"`` or ``"affine"``.
        ridge: pulls towards equal weights: this share of the Gram matrix's mean diagonal is added to its diagonal.

    Raises:
        ValueError: another constraint, a negative ridge, or levels without data or noise.
    """
    if constraint not in CONSTRAINTS or ridge < 0:
        raise ValueError(
            f"constraint is {constraint!r} and ridge {ridge!r}, expected one of {', '.join(CONSTRAINTS)} and ridge >= 0"
        )
    if not np.isfinite(loss.log_snr).all():
        raise ValueError(
            f"the loss has levels of data alone, or of noise alone, at the times {loss.times.tolist()}; leave those out"
        )
    levels, place = np.unique(loss.log_snr, return_inverse=True)  # a discrete schedule may have fewer than were asked
    every = loss.gram.mean(0)
    weights = []
    for gram in (every[place == i].mean(0) for i in range(len(levels))):
        regular = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        w = _affine(regular) if constraint == "affine" else _simplex(regular)
        weights.append(tuple(float(value) for value in w))
    return NoiseDependentMean(tuple(weights), tuple(float(level) for level in levels))


def weighted_loss(fitted: NoiseDependentMean, loss: DenoisingLoss) -> np.ndarray:
    """The loss of the fitted mean on other rows, [N, L], from the Gram matrices there."""
    w = np.array([fitted.at(level).weights for level in loss.log_snr])  # [L, K]
    return np.einsum("lk,nlkm,lm->nl", w, loss.gram, w)


def held_out_gain(fitted: NoiseDependentMean, loss: DenoisingLoss) -> Estimate:
    """Loss of the plain mean minus that of the fitted one on other rows, with the paired difference's error."""
    plain = loss.gram.mean((-1, -2))
    return loss.estimate(plain - weighted_loss(fitted, loss))


def _affine(gram: np.ndarray) -> np.ndarray:
    w = np.linalg.lstsq(gram, np.ones(len(gram)), rcond=None)[0]
    return w / w.sum()


def _simplex(gram: np.ndarray) -> np.ndarray:
    """Minimise ``w^T G w`` on the simplex: non-negative least squares for ``G u = 1``, scaled (Lawson and Hanson)."""
    size = len(gram)
    u, passive = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(3 * size):
        gradient = 1 - gram @ u
        candidates = np.where(passive, -np.inf, gradient)
        if passive.all() or candidates.max() <= 1e-10:
            break
        passive[np.argmax(candidates)] = True
        while True:
            trial = np.zeros(size)
            trial[passive] = np.linalg.lstsq(gram[np.ix_(passive, passive)], np.ones(passive.sum()), rcond=None)[0]
            if (trial[passive] > 0).all():
                break
            falling = passive & (trial <= 0)
            step = np.min(u[falling] / (u[falling] - trial[falling]))
            u = u + step * (trial - u)
            passive &= u > 1e-14
            u[~passive] = 0
        u = trial
    return u / u.sum()
