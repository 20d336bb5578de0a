"""The best weights of a mean: its loss is quadratic in them, so they come in closed form from the members' errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastens import rules
from fastens.ensemble import Ensemble
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.loss import DenoisingLoss, Estimate
from fastens.schedules import per_sample

CONSTRAINTS = ("simplex", "affine")


@dataclasses.dataclass(frozen=True)
class NoiseDependentMean:
    """A weighted mean whose weights depend on the time, interpolated linearly between noise levels.

    Attributes:
        times: of the noise levels, rising, L numbers.
        weights: of the members at each, L tuples of K numbers that sum to 1.
    """

    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def at(self, t: float) -> rules.Mean:
        """The rule for inputs at one time: ``ens.rule = fitted.at(t)``."""
        columns = zip(*self.weights, strict=True)
        return rules.Mean(tuple(float(np.interp(t, self.times, column)) for column in columns))

    def combine(self, outputs: Tensor, t: Tensor) -> Tensor:
        """Combine the members' outputs [K, B, ...] at a time per sample, [B], or one for all, []."""
        times = torch.tensor(self.times, dtype=torch.float64, device=outputs.device)
        table = torch.tensor(self.weights, dtype=torch.float64, device=outputs.device)  # [L, K]
        t = t.to(outputs.device, torch.float64).expand(outputs.shape[1]).clamp(times[0], times[-1])
        right = torch.searchsorted(times, t).clamp(1, len(times) - 1) if len(times) > 1 else torch.zeros_like(t).long()
        left = (right - 1).clamp_min(0)
        share = ((t - times[left]) / (times[right] - times[left]).clamp_min(1e-300)).nan_to_num(0).unsqueeze(-1)
        weights = (table[left] + share * (table[right] - table[left])).T  # [K, B]
        return sum(per_sample(w, output) * output for w, output in zip(weights, outputs, strict=True))  # pyright: ignore

    def denoiser(self, denoiser: Denoiser) -> Denoiser:
        """The same members under this rule, for loss, likelihood and sampling."""
        weighted = _Weighted(denoiser, self)
        return Denoiser(weighted, denoiser.schedule, denoiser.prediction, denoiser.conditioning)

    def to_dict(self) -> dict[str, Any]:
        """Return the weights as JSON-able values."""
        return {"times": list(self.times), "weights": [list(row) for row in self.weights]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NoiseDependentMean:
        """Return what :meth:`to_dict` wrote."""
        return cls(tuple(data["times"]), tuple(tuple(row) for row in data["weights"]))


class _Weighted(nn.Module):
    def __init__(self, denoiser: Denoiser, mean: NoiseDependentMean) -> None:
        super().__init__()
        if not isinstance(denoiser.model, Ensemble):
            raise TypeError(
                f"the model is a {type(denoiser.model).__name__}, expected an Ensemble, whose members to weigh"
            )
        self.ensemble = denoiser.model
        self.inner = denoiser
        self.mean = mean

    def forward(self, x: Tensor, network_time: Tensor, **conditioning: Any) -> Tensor:
        t = self.inner.schedule.time(network_time)
        return self.mean.combine(self.inner.outputs(x, t), t)


def fit_weights(loss: DenoisingLoss, *, constraint: str = "simplex", ridge: float = 0.0) -> NoiseDependentMean:
    """Fit the weights of least loss at every noise level.

    The loss of a weighted mean is ``w^T G w``, with G the Gram matrix of the members' errors. Under ``sum w = 1``
    ("affine") the minimum is ``G^-1 1 / (1^T G^-1 1)``; with ``w >= 0`` besides ("simplex") an active set finds it.

    Args:
        loss: of the members, on rows to fit on; see :func:`denoising_loss`.
        constraint: ``"simplex"`` or ``"affine"``.
        ridge: pulls towards equal weights: this share of the Gram matrix's mean diagonal is added to its diagonal.

    Raises:
        ValueError: another constraint, or a negative ridge.
    """
    if constraint not in CONSTRAINTS or ridge < 0:
        raise ValueError(
            f"constraint is {constraint!r} and ridge {ridge!r}, expected one of {', '.join(CONSTRAINTS)} and ridge >= 0"
        )
    order = np.argsort(loss.times)
    weights = []
    for gram in loss.gram.mean(0)[order]:
        regular = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        w = _affine(regular) if constraint == "affine" else _simplex(regular)
        weights.append(tuple(float(value) for value in w))
    return NoiseDependentMean(tuple(float(t) for t in loss.times[order]), tuple(weights))


def weighted_loss(fitted: NoiseDependentMean, loss: DenoisingLoss) -> np.ndarray:
    """The loss of the fitted mean on other rows, [N, L], from the Gram matrices there."""
    w = np.array([fitted.at(t).weights for t in loss.times])  # [L, K]
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
