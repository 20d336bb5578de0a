"""A conditional model as a classifier: log-likelihoods of images under each class."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.levels import levels
from fastens.evaluation.likelihood import likelihood
from fastens.evaluation.quality import Interval
from fastens.ops.normal import normal

METHODS = ("denoising", "likelihood")
_DRAWS = 3 << 20  # draws of a sample that are not those of other uses


@dataclasses.dataclass(frozen=True)
class ClassLikelihoods:
    """Log-likelihoods of images under classes, in nats, up to a constant of each image.

    Attributes:
        values: of the model by its rule, [N, C].
        members: of each member alone, [K, N, C]; none by ``"likelihood"``.
        draws: how many noise draws each has, [N, C]; fewer where a class was given up.
    """

    values: np.ndarray
    members: np.ndarray | None
    draws: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """Return the most likely class of each image among those kept, int64 [N]."""
        return self._likeliest(self.values)

    def _likeliest(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.draws == self.draws.max(1, keepdims=True), values, -np.inf).argmax(1)

    def accuracy(self, labels: Tensor | np.ndarray, member: int | None = None) -> Interval:
        """The share of images whose likeliest class is theirs, with Wilson's interval of 95 %.

        Args:
            labels: places of the true classes, [N].
            member: whose; none for the rule's.
        """
        if member is not None and self.members is None:
            raise ValueError("by='likelihood' gives the rule's values only; take an ensemble of the member")
        values = self.values if member is None or self.members is None else self.members[member]
        right, z = float((self._likeliest(values) == np.asarray(labels)).mean()), 1.959964
        total = len(values)
        centre, half = right + z**2 / (2 * total), z * math.sqrt(right * (1 - right) / total + (z / (2 * total)) ** 2)
        scale = 1 + z**2 / total
        return Interval(right, (centre - half) / scale, (centre + half) / scale)


@torch.no_grad()
def class_log_likelihoods(
    model: Denoiser | Sequence[Denoiser],
    data: Tensor,
    classes: Sequence[Any] | None = None,
    *,
    argument: str = "class_labels",
    by: str = "denoising",
    draws: int = 64,
    give_up: float | None = None,
    stages: int = 4,
    batch_size: int = 512,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
    **options: Any,
) -> ClassLikelihoods:
    """Log-likelihoods of images under each class of a conditional model, or under one model per class.

    By ``"denoising"`` they are ``-1/2 E |eps - eps_c(x_t, t)|^2`` over noise levels, times the range of ``log(alpha^2 /
    sigma^2)`` from which these are drawn: the variational bound (Kingma et al., NeurIPS 2021) without what all classes
    have alike. Noise and levels are shared by all classes, so that differences are far less noisy than values (Li et
    al., "Your diffusion model is secretly a zero-shot classifier", ICCV 2023), and levels are stratified. One pass
    evaluates all members, and each alone is read off as well.

    Args:
        model: a denoiser whose network takes the class by ``argument``, or one denoiser per class.
        data: [N, ...] in ``data_range``.
        classes: values of the argument, numbers or tensors of one row; none where there is one denoiser per class.
        argument: by which the network takes them.
        by: ``"denoising"``, or ``"likelihood"`` by the probability-flow ODE, see :func:`likelihood`.
        draws: of noise and level for each image.
        give_up: a class is drawn no further once its mean error is so many standard errors of the paired difference
            above the best one's, after each of the stages; none for never.
        stages: in which the draws are taken.
        batch_size: inputs in one pass.
        seed: of the noise.
        data_range: what the data must lie in.
        **options: of :func:`likelihood`.

    Raises:
        TypeError: data that is no floating-point tensor; options of the other.
        ValueError: no classes, or one model per class and classes too; numbers out of range; another ``by``.
        RuntimeError: an error that is not finite.
    """
    check_data("data", data, *data_range)
    per_class = _denoisers(model, classes, argument)
    if by not in METHODS:
        raise ValueError(f"by {by!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")
    if by == "likelihood":
        size = math.prod(data.shape[1:])
        found = [
            likelihood(each(data[:1]), data, seed=seed, data_range=data_range, batch_size=batch_size, **options)
            for each in per_class
        ]
        values = np.stack([-each.rows * size * math.log(2) for each in found], 1)
        return ClassLikelihoods(values, None, np.ones(values.shape, dtype=np.int64))
    if options:
        raise TypeError(f"{', '.join(options)}: options of by='likelihood', and this is 'denoising'")
    if any(each.denoiser.rule.random for each in per_class):
        raise ValueError("the rule draws members, and a likelihood is of one field; take ens.with_rule('mean')")
    if min(draws, stages, batch_size) < 1 or stages > draws or (give_up is not None and not give_up > 0):
        raise ValueError(
            f"draws is {draws}, stages {stages}, batch_size {batch_size} and give_up {give_up}, expected at least one "
            "draw in each stage, and give_up above 0"
        )
    return _by_denoising(per_class, data, draws, give_up, stages, batch_size, seed)


class _OfClass:
    """A denoiser under one class."""

    def __init__(self, denoiser: Denoiser, argument: str | None, value: Any) -> None:
        self.denoiser, self._argument, self._value = denoiser, argument, value

    def __call__(self, x: Tensor) -> Denoiser:
        """The denoiser for as many rows as x has."""
        if self._argument is None:
            return self.denoiser
        under = copy.copy(self.denoiser)
        value = torch.as_tensor(self._value).to(x.device)
        under.conditioning = {**under.conditioning, self._argument: value.expand(len(x), *value.shape).contiguous()}
        return under


def _denoisers(model: Any, classes: Any, argument: str) -> list[_OfClass]:
    if isinstance(model, Denoiser):
        if classes is None or not len(classes):
            raise ValueError(f"classes: expected the values of {argument!r}, one per class, got {classes!r}")
        return [_OfClass(model, argument, value) for value in classes]
    models = list(model)
    if not models or not all(isinstance(each, Denoiser) for each in models):
        raise ValueError("model: expected a Denoiser, or one per class")
    if classes is not None:
        raise ValueError("classes: given beside one model per class; pass either")
    if len({each.schedule for each in models}) > 1:
        raise ValueError("model: the classes' models have different schedules, so they cannot share noise levels")
    return [_OfClass(each, None, None) for each in models]


def _by_denoising(
    per_class: list[_OfClass],
    data: Tensor,
    draws: int,
    give_up: float | None,
    stages: int,
    batch_size: int,
    seed: int,
) -> ClassLikelihoods:
    first = per_class[0].denoiser
    ratios, times = levels(first.schedule, 2 * draws, None)
    times = times[1::2]  # the middles of equal intervals of log-SNR
    span = 2 * math.log(float(ratios[0] / ratios[-1]))
    rows, count, members = len(data), len(per_class), first.num_members
    order = torch.randperm(draws, generator=torch.Generator().manual_seed(seed))
    errors = torch.full((draws, 1 + members, rows, count), math.nan, dtype=torch.float64)
    alive = torch.ones(rows, count, dtype=torch.bool)
    for stage in range(stages):
        for draw in order[stage * draws // stages : (stage + 1) * draws // stages].tolist():
            for c, of_class in enumerate(per_class):
                for where in alive[:, c].nonzero()[:, 0].split(batch_size):
                    found = _errors(of_class, data, where, times[draw], seed, draw)
                    if not found.isfinite().all():  # NaN is what was not drawn
                        image = int(where[(~found.isfinite().all(0)).nonzero()[0]])
                        raise RuntimeError(
                            f"the error of image {image} under class {c} is not finite at time {float(times[draw]):g}: "
                            "a member returns NaN or infinity there; leave that member, or that image, out"
                        )
                    errors[draw, :, where, c] = found
        if give_up is not None and stage < stages - 1:
            alive &= ~_given_up(errors[:, 0], give_up)
    values = -0.5 * span * _paired(errors, alive)
    return ClassLikelihoods(values[0].numpy(), values[1:].numpy(), (~errors[:, 0].isnan()).sum(0).numpy())


def _errors(of_class: _OfClass, data: Tensor, where: Tensor, t: Tensor, seed: int, draw: int) -> Tensor:
    """Squared errors of the noise under one class, of the rule and of each member, [1 + K, B]."""
    clean = data[where].to(of_class.denoiser.device)
    denoiser = of_class(clean)
    noise = normal(seed, _DRAWS + draw, where.to(clean.device), tuple(data.shape[1:])).to(clean)
    alpha, sigma = denoiser.schedule.coefficients(t, clean)
    x = (alpha * clean + sigma * noise).to(clean.dtype)
    outputs = denoiser.outputs(x, t)
    combined = denoiser.combine(outputs, denoiser.rule, x, t)
    found = torch.cat([combined.unsqueeze(0), outputs])
    return (denoiser.to_epsilon(found, x, t).double() - noise.double()).square().flatten(2).sum(2).cpu()


def _paired(errors: Tensor, alive: Tensor) -> Tensor:
    """Mean errors [1 + K, N, C] of errors [draws, 1 + K, N, C], of which classes that were given up lack some.

    Draws are of different noise levels, so what was given up is compared with the best of the others on its own draws.
    """
    mean = errors.nanmean(0)
    best = torch.where(alive, mean[0], math.inf).argmin(1)
    at = best.view(1, 1, -1, 1).expand(*errors.shape[:-1], 1)
    differences = (errors - errors.gather(3, at)).nanmean(0)
    return torch.where(alive, mean, mean.gather(2, at[0]) + differences)


def _given_up(errors: Tensor, bound: float) -> Tensor:
    """Which classes are worse than each row's best by so many standard errors of the paired differences, [N, C]."""
    mean = errors.nanmean(0)
    best = mean.argmin(1)
    differences = errors - errors.gather(2, best.view(1, -1, 1).expand(len(errors), -1, 1))
    number = (~differences.isnan()).sum(0)
    centre = differences.nanmean(0)
    spread = ((differences - centre).square().nanmean(0) * number / (number - 1).clamp_min(1)).sqrt()
    return (number > 1) & (centre > bound * spread / number.sqrt()) & (centre > 0)
