"""The denoising loss of members and of every rule over them, all from one folded pass per batch (arXiv 2601.11444)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens import rules
from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.progress import Progress
from fastens.ops.draw_members import draw_members
from fastens.reference.normal import normal
from fastens.schedules import Schedule

WEIGHTINGS = ("uniform", "likelihood", "edm")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over rows and the standard error of that mean."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.5f} ± {self.error:.5f}"


@dataclasses.dataclass(frozen=True)
class DenoisingLoss:
    """Mean squared error of the predicted noise, by row and noise level.

    Attributes:
        times: the noise levels' times, [L].
        log_snr: ``log(alpha^2 / sigma^2)`` there, [L].
        level_weights: of the levels in the weighted loss, [L], summing to 1.
        members: of each member, [K, N, L].
        rules: of the ensemble under each rule, [N, L].
        by_size: of ensembles of fewer members, the mean over subsets of each size, rule -> {size: [N, L]}.
        diversity: mean over members and elements of (eps_k - mean)^2, [N, L].
        gram: inner products of the members' errors, divided by the number of elements, [N, L, K, K].
    """

    times: np.ndarray
    log_snr: np.ndarray
    level_weights: np.ndarray
    members: np.ndarray
    rules: dict[str, np.ndarray]
    by_size: dict[str, dict[int, np.ndarray]]
    diversity: np.ndarray
    gram: np.ndarray

    @property
    def member_mean(self) -> np.ndarray:
        """The mean of the members' losses, [N, L]."""
        return self.members.mean(0)

    @property
    def best_member(self) -> int:
        """The member of least weighted loss."""
        return int(np.argmin((self.members.mean(1) * self.level_weights).sum(-1)))

    def estimate(self, losses: np.ndarray) -> Estimate:
        """Weighted loss over levels of ``losses`` [N, L], and its standard error over rows."""
        return _estimate((losses * self.level_weights).sum(-1))

    def compare(self, rule: str, against: np.ndarray | None = None) -> Estimate:
        """Loss of a rule minus that of ``against`` [N, L] (default: the member mean), with the paired error.

        Rows, noise levels and noise are the same for both, so this error is far below that of either loss.
        """
        return self.estimate(self.rules[rule] - (self.member_mean if against is None else against))

    def summary(self) -> str:
        """The best rule and what it gains, in a sentence."""
        best = min(self.rules, key=lambda rule: self.estimate(self.rules[rule]).value)
        return (
            f"{best} has the least loss of {len(self.rules)} rules, {self.estimate(self.rules[best])}; against the "
            f"mean of the {len(self.members)} members' losses {self.compare(best)}, against the best member's "
            f"{self.compare(best, self.members[self.best_member])}"
        )

    def to_frame(self) -> Any:
        """A pandas table: a row for each member and rule, with its loss and its difference from the member mean."""
        import pandas as pd

        losses = {f"member {k}": member for k, member in enumerate(self.members)} | self.rules
        rows = []
        for name, values in losses.items():
            loss, against = self.estimate(values), self.estimate(values - self.member_mean)
            rows.append([name, loss.value, loss.error, against.value, against.error])
        names = ["of", "loss", "error", "against_member_mean", "against_error"]
        return pd.DataFrame(rows, columns=pd.Index(names)).set_index("of")

    def plot(self, axis: Any = None) -> Any:
        """Draw each rule's loss by noise level against the member mean, with standard errors; the axes are returned."""
        import matplotlib.pyplot as plt

        axis = plt.subplots()[1] if axis is None else axis
        base = self.member_mean.mean(0)
        for rule, values in self.rules.items():
            difference = values - self.member_mean
            error = difference.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros_like(base)
            axis.errorbar(self.log_snr, 100 * difference.mean(0) / base, 100 * error / base, label=rule, capsize=2)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set(xlabel="log SNR", ylabel="change of the loss against the member mean, %")
        axis.legend()
        return axis

    def identity_gap(self) -> float:
        """Largest violation, over levels, of *member mean = mean ensemble + diversity*; rounding only."""
        ensemble = self.gram.mean((-1, -2))
        return float(np.abs((self.member_mean - ensemble - self.diversity).mean(0)).max())


def _estimate(rows: np.ndarray) -> Estimate:
    error = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan
    return Estimate(float(rows.mean()), error)


def noise_levels(denoiser: Denoiser, num: int) -> Tensor:
    """Times of ``num`` noise levels: the middles of equal intervals between data and prior, at whole steps if discrete.

    Returns:
        float64 [num].
    """
    if num < 1:
        raise ValueError(f"num is {num}, expected at least one noise level")
    return times_at(denoiser.schedule, (torch.arange(num, dtype=torch.float64) + 0.5) / num)


def times_at(schedule: Schedule, share: Tensor) -> Tensor:
    """Times at shares of the way from data to prior, float64; whole steps if discrete, in log sigma for EDM's."""
    if schedule.name == "edm":  # times are sigmas: equal intervals of their logarithm
        low, high = math.log(schedule.t_data), math.log(schedule.t_prior)
        return (low + share * (high - low)).exp()
    times = schedule.t_data + share * (schedule.t_prior - schedule.t_data)
    return times.round() if schedule.name == "discrete" else times


def _spacing(schedule: Schedule, times: Tensor) -> Tensor:
    """How much time a level of :func:`times_at` stands for, up to a factor."""
    return times if schedule.name == "edm" else torch.ones_like(times)


def level_weights(denoiser: Denoiser, times: Tensor, weighting: str, sigma_data: float = 0.5) -> np.ndarray:
    """Weights of the levels' noise-prediction losses, summing to 1.

    ``"uniform"``: equal. ``"likelihood"``: ``g^2 / sigma^2 dt``, by which the losses add up to the score-matching loss
    that bounds the likelihood (Song et al., "Maximum likelihood training of score-based diffusion models", NeurIPS
    2021); dt is the time between levels spaced as :func:`times_at` does: equal ones, or in log sigma for EDM's.
    ``"edm"``: ``1 + (s / sigma_data)^2`` with ``s = sigma / alpha``, EDM's loss of the denoised image (Karras et al.,
    NeurIPS 2022).

    Raises:
        ValueError: another weighting, or weights that are not finite at these times.
    """
    schedule = denoiser.schedule
    if weighting == "uniform":
        weights = torch.ones_like(times)
    elif weighting == "likelihood":
        # g^2 / sigma^2, whichever way the time runs
        rate = 2 * (schedule.sigma_rate(times) / schedule.sigma(times) - schedule.drift(times)).abs()
        weights = rate * _spacing(schedule, times)
    elif weighting == "edm":
        weights = 1 + (schedule.sigma(times) / schedule.alpha(times) / sigma_data).square()
    else:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not torch.isfinite(weights).all():
        raise ValueError(f"weighting {weighting!r} is not finite at the times {times.tolist()}; leave out the ends")
    return (weights / weights.sum()).numpy()


def subsets_of(num_members: int, size: int, most: int) -> list[tuple[int, ...]]:
    """Up to ``most`` subsets of a size: all of them, or evenly spaced ones in lexicographic order."""
    total = math.comb(num_members, size)
    wanted = {round(i * (total - 1) / max(1, most - 1)) for i in range(most)} if total > most else None
    found = enumerate(itertools.combinations(range(num_members), size))
    return [subset for i, subset in found if wanted is None or i in wanted]


@torch.no_grad()
def denoising_loss(
    denoiser: Denoiser,
    data: Tensor,
    *,
    rule_names: Sequence[str | rules.Rule] = ("mean",),
    times: Tensor | int = 20,
    draws: int = 1,
    by_size: Sequence[str | rules.Rule] = (),
    most_subsets: int = 10,
    weighting: str = "uniform",
    sigma_data: float = 0.5,
    batch_size: int = 512,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
    progress: bool | str = False,
) -> DenoisingLoss:
    """Measure the noise-prediction loss of members, rules and smaller ensembles, evaluating each member once per input.

    A row's noise at a level depends on the seed, the row's number and the level only, so results do not depend on
    ``batch_size`` beyond rounding, and two models can be compared on the same noise.

    Args:
        denoiser: the model or ensemble under its schedule.
        data: [N, ...] in ``data_range``.
        rule_names: names or values of rules; ``"mixture"`` draws one member per row for all levels. Rules by noise
            level go by their class's name; the second of them is ``"noise_dependent_mean 2"``.
        times: times of the noise levels, float [L], or how many of :func:`noise_levels`.
        draws: noise draws per row and level, averaged.
        by_size: rules to evaluate also over subsets of the members.
        most_subsets: the most subsets of each size.
        weighting: see :func:`level_weights`.
        sigma_data: standard deviation of the data, for EDM's weighting.
        batch_size: inputs in one pass; each member sees this many.
        seed: of the noise.
        data_range: what ``data`` must lie in.
        progress: show a progress bar, with this text in front of it.

    Raises:
        TypeError: data that is no floating-point tensor.
        ValueError: data out of range or empty; an unknown rule or weighting; fewer than one draw, level or subset.
    """
    check_data("data", data, *data_range)
    if min(draws, batch_size, most_subsets) < 1:
        raise ValueError(
            f"draws is {draws}, batch_size {batch_size} and most_subsets {most_subsets}, expected at least 1 of each"
        )
    named, sized = _named(rule_names), _named(by_size)
    for rule in sized.values():
        if rule.random or getattr(rule, "weights", None) is not None:
            raise ValueError(f"by_size: rule {rule} has no meaning for a subset of the members")
    levels = noise_levels(denoiser, times) if isinstance(times, int) else torch.as_tensor(times, dtype=torch.float64)
    if levels.ndim != 1 or not len(levels):
        raise ValueError(f"times is {list(levels.shape)}, expected [L], the times of L noise levels, or how many")
    weights = level_weights(denoiser, levels, weighting, sigma_data)
    num_members, rows, num_levels = denoiser.num_members, len(data), len(levels)
    chosen = {size: subsets_of(num_members, size, most_subsets) for size in range(1, num_members)}
    fixed = draw_members(seed, 0, num_members, rows)
    drawn = torch.stack([draw_members(seed, 1 + i, num_members, rows) for i in range(num_levels * draws)])

    flat: dict[Any, Tensor] = {}

    def add(key: Any, where: Tensor, values: Tensor) -> None:
        if key not in flat:
            flat[key] = torch.zeros(rows * num_levels, *values.shape[1:], dtype=torch.float64)
        flat[key].index_add_(0, where, values.double().cpu() / draws)

    total = rows * num_levels
    with Progress("denoising loss", total * draws, "input", progress) as bar:
        for draw, start in itertools.product(range(draws), range(0, total, batch_size)):
            where = torch.arange(start, min(start + batch_size, total))
            row, level = where // num_levels, where % num_levels
            noise = normal(seed, level * draws + draw, row, tuple(data.shape[1:])).to(denoiser.device, data.dtype)
            clean, t = data[row].to(denoiser.device), levels[level].to(denoiser.device)
            alpha, sigma = denoiser.schedule.coefficients(t, clean)
            x = (alpha * clean + sigma * noise).to(clean.dtype)
            outputs = denoiser.outputs(x, t)  # [K, B, ...]
            epsilons = denoiser.to_epsilon(outputs, x, t)
            errors = (epsilons.double() - noise.double()).flatten(2)  # [K, B, D]
            add("gram", where, torch.einsum("kbd,lbd->bkl", errors, errors) / errors.shape[-1])
            add("members", where, errors.square().mean(-1).T)
            spread = epsilons.double() - epsilons.double().mean(0)
            add("diversity", where, spread.square().flatten(2).mean((0, 2)))

            def loss_of(predicted: Tensor, x: Tensor = x, t: Tensor = t, noise: Tensor = noise) -> Tensor:
                return (denoiser.to_epsilon(predicted, x, t).double() - noise.double()).square().flatten(1).mean(1)

            for name, rule in named.items():
                if rule.random:
                    member = fixed[row] if rule.per_trajectory else drawn[level * draws + draw, row]
                    combined = outputs[member.to(x.device), torch.arange(len(x), device=x.device)]
                else:
                    combined = denoiser.combine(outputs, rule, x, t)
                add(("rule", name), where, loss_of(combined))
            for (name, rule), (size, subsets) in itertools.product(sized.items(), chosen.items()):
                for subset in subsets:
                    combined = denoiser.combine(outputs[list(subset)], rule, x, t)
                    add((name, size), where, loss_of(combined) / len(subsets))
            bar.update(len(where))
    table = {key: value.numpy().reshape(rows, num_levels, *value.shape[1:]) for key, value in flat.items()}
    by_rule = {name: table["rule", name] for name in named}
    return DenoisingLoss(
        times=levels.numpy(),
        log_snr=denoiser.schedule.log_snr(levels).numpy(),
        level_weights=weights,
        members=np.moveaxis(table["members"], -1, 0),
        rules=by_rule,
        by_size={name: {size: table[name, size] for size in chosen} for name in sized},
        diversity=table["diversity"],
        gram=table["gram"],
    )


def _named(given: Sequence[str | rules.Rule]) -> dict[str, rules.Rule]:
    """Rules by names of their own: of those that share one the second has a 2 behind it."""
    found: dict[str, rules.Rule] = {}
    for value in dict.fromkeys(map(rules.get, given)):
        name, same = _name(value), sum(_name(other) == _name(value) for other in found.values())
        found[f"{name} {same + 1}" if same else name] = value
    return found


def _name(value: rules.Rule) -> str:
    if value.needs_noise_level:
        return value.name
    return value.name if value == rules.get(value.name) else str(value)
