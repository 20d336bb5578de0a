"""Merging against ensembling: the best single member, merges, the ensemble and a student, by loss and cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.loss import denoising_loss, times_at
from fastens.evaluation.quality import Interval
from fastens.merging import merge, merge_weights
from fastens.schedules import Prediction, Schedule

BEST = "best single"
ENSEMBLE = "ensemble"
STUDENT = "student"


def merge_loss(
    data: Tensor,
    schedule: Any,
    prediction: str | Prediction | None = None,
    *,
    rows: int = 256,
    fresh: bool = False,
    seed: int = 0,
) -> Callable[[Ensemble], Tensor]:
    """The denoising loss of candidates, as :func:`fastens.merge` takes it: an ensemble's to losses [C, rows].

    Args:
        data: clean samples [N, ...].
        schedule: that the members were trained under.
        prediction: what they predict.
        rows: noisy rows in one loss, at times spread evenly over the schedule.
        fresh: take new rows and noise at every call, as gradients do; else the same.
        seed: of rows and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(ensemble: Ensemble) -> Tensor:
        if not fresh:
            generator.manual_seed(seed)
        denoiser = Denoiser(ensemble, schedule, prediction)
        clean = data[torch.randint(len(data), (rows,), generator=generator)].to(denoiser.device)
        share = (torch.arange(rows, dtype=torch.float64) + torch.rand((), generator=generator).double()) / rows
        t = times_at(denoiser.schedule, share)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
        alpha, sigma = denoiser.schedule.coefficients(t, clean)
        x = (alpha * clean + sigma * noise).to(clean.dtype)
        found = denoiser.to_epsilon(denoiser.outputs(x, t), x, t)
        return (found - noise).float().square().flatten(2).mean(2)

    return loss


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to use the members.

    Attributes:
        rows: its loss by test row, [N].
        evaluations: of networks, for one of it.
        milliseconds: of one evaluation.
        what: members or weights that it is of, in words.
    """

    rows: np.ndarray
    evaluations: int
    milliseconds: float
    what: str


@dataclasses.dataclass(frozen=True)
class MergeStudy:
    """What :func:`merge_study` found.

    Attributes:
        members: each member's loss by test row, [K, N].
        pool: numbers of those that merges and ensemble are of.
        contenders: by name.
        weights: of the merges.
    """

    members: np.ndarray
    pool: list[int]
    contenders: dict[str, Contender]
    weights: dict[str, dict[str, tuple[float, ...]]]

    def change(self, name: str, against: str = BEST) -> Interval:
        """The change of the loss against another's, in per cent, with a bootstrap interval over rows of 95 %."""
        one, other = self.contenders[name].rows, self.contenders[against].rows
        return _bootstrap(lambda i: 100 * (one[i].mean() / other[i].mean() - 1), len(one))

    def kept(self, name: str) -> Interval:
        """The share that a contender keeps of the ensemble's gain over its members' mean, with such an interval."""
        mean = self.members[self.pool].mean(0)
        one, best = self.contenders[name].rows, self.contenders[ENSEMBLE].rows
        return _bootstrap(lambda i: (mean[i] - one[i]).mean() / (mean[i] - best[i]).mean(), len(one))

    @property
    def merges(self) -> list[str]:
        """The names of the merges."""
        return [name for name in self.contenders if name.endswith("merge")]

    def verdict(self) -> list[str]:
        """What the intervals say, a sentence each."""
        best = min(self.merges, key=lambda name: self.contenders[name].rows.mean())
        by, uniform = self.change(best), self.change("uniform merge")
        if by.high < 0:
            said = [
                f"Merging works here: the {best} changes the best single member's loss by {_percent(by)}, at its cost."
            ]
        elif by.low > 0 or self._single(best):
            said = [f"Merging fails here: the best of the merges ({best}) is no better than the best single member."]
        else:
            said = [f"Merging changes nothing here that {len(self.members[0])} rows show ({best}: {_percent(by)})."]
        if uniform.low > 0:
            said.append(
                f"The members do not lie in one basin: the uniform merge changes the loss by {_percent(uniform)}."
            )
        ensemble, against = self.change(ENSEMBLE), self.change(ENSEMBLE, best)
        times = self.contenders[ENSEMBLE].milliseconds / self.contenders[BEST].milliseconds
        says = "better than" if against.high < 0 else "worse than" if against.low > 0 else "not told apart from"
        said.append(
            f"The ensemble of {len(self.pool)} changes that loss by {_percent(ensemble)} at {times:.1f} times the "
            f"cost, and is {says} the {best} ({_percent(against)})."
        )
        if STUDENT in self.contenders:
            kept = self.kept(STUDENT)
            said.append(
                f"The student keeps {100 * kept.value:.0f} % [{100 * kept.low:.0f}, {100 * kept.high:.0f}] of the "
                "ensemble's gain over its members, at the cost of one."
            )
        return said

    def _single(self, name: str) -> bool:
        rows = self.weights.get(name.removesuffix(" merge"), {}).values()
        return all(max(row) > 0.999 for row in rows)

    def plot(self, axis: Any = None) -> Any:
        """Draw loss against cost with 95 % intervals of the difference from the best single; the axes are returned."""
        import matplotlib.pyplot as plt

        axis = plt.subplots()[1] if axis is None else axis
        base, one = self.contenders[BEST].rows.mean(), self.contenders[BEST].milliseconds
        markers = {BEST: ("o", "0.4"), ENSEMBLE: ("s", "tab:blue"), STUDENT: ("*", "tab:red")}
        colours = iter(("tab:orange", "tab:green", "tab:purple"))
        singles = [name for name in self.contenders if name != ENSEMBLE]
        top = 1.15 * max(base, self.members[self.pool].mean())
        for name, contender in self.contenders.items():
            loss, change = contender.rows.mean(), self.change(name)
            marker, colour = markers.get(name) or ("D", next(colours))
            cost = contender.milliseconds / one
            if name in singles:
                cost = 1 + 0.08 * (singles.index(name) - (len(singles) - 1) / 2)
            if loss > top:  # off the scale, at its upper edge
                axis.plot(cost, 0.98, "^", color=colour, transform=axis.get_xaxis_transform(), markersize=9)
                axis.plot([], [], "^", color=colour, label=f"{name}: {loss:.3f}, off the scale")
                continue
            bars = [[base * (change.value - change.low) / 100], [base * (change.high - change.value) / 100]]
            axis.errorbar(cost, loss, bars, fmt=marker, color=colour, label=name, capsize=3, markersize=9)
        axis.axhline(self.members[self.pool].mean(), color="0.6", linewidth=0.8, linestyle=":", label="members' mean")
        axis.set(xlabel="cost of an evaluation (all beside 1: one network)", ylabel="denoising loss of test images")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="center right")
        return axis


def merge_study(
    members: Sequence[nn.Module],
    fit: Tensor,
    test: Tensor,
    schedule: Any,
    prediction: str | Prediction | None = None,
    *,
    student: nn.Module | None = None,
    student_steps: int = 0,
    pool: int = 8,
    times: int = 20,
    steps: int = 60,
    fit_rows: int = 400,
    seed: int = 0,
    progress: bool | str = False,
) -> MergeStudy:
    """Hold merges of members against the best of them, their ensemble, and a student.

    Members are read in groups of ``pool``, so that as many are in memory at once. What is chosen (the best member, the
    pool, weights) is chosen on ``fit``, and judged on ``test``.

    Args:
        members: modules, or checkpoints (:func:`fastens.load_members`): of one run, or of several.
        fit: clean samples to choose by, [N, ...] in [-1, 1].
        test: others, to judge by.
        schedule: that the members were trained under.
        prediction: what they predict.
        student: a network to judge beside them; none for none.
        student_steps: of a student's training from the best member, where none is given; 0 for no student.
        pool: the most members of merges and ensemble: those of least loss on ``fit``.
        times: noise levels.
        steps: of the fitted merge.
        fit_rows: the most rows of ``fit`` that members are compared on.
        seed: of all noise.
        progress: show progress bars.

    Raises:
        TypeError: data that is no floating-point tensor.
        ValueError: fewer than two members, or of different structure; data out of range.
    """
    check_data("fit", fit)
    check_data("test", test)
    if len(members) < 2 or pool < 2:
        raise ValueError(f"merge_study: {len(members)} members and a pool of {pool}, expected at least two of each")

    def losses(model: nn.Module, data: Tensor) -> np.ndarray:
        denoiser = Denoiser(model, schedule, prediction)
        return denoising_loss(denoiser, data, times=times, batch_size=128, seed=seed).members.mean(2)

    def by_rule(model: Ensemble) -> np.ndarray:
        denoiser = Denoiser(model, schedule, prediction)
        (found,) = denoising_loss(denoiser, test, times=times, batch_size=128, seed=seed).rules.values()
        return found.mean(1)

    chosen, judged = [], []
    for start in range(0, len(members), pool):
        group = Ensemble(members[start : start + pool], engine="fold")
        chosen.append(losses(group, fit[:fit_rows]).mean(1))
        judged.append(losses(group, test))
    by_fit, by_member = np.concatenate(chosen), np.concatenate(judged)
    order = np.argsort(by_fit)
    kept = sorted(int(k) for k in order[:pool])
    ensemble = Ensemble([members[k] for k in kept], engine="fold")
    best = members[int(order[0])]

    half = len(fit) // 2
    fixed = merge_loss(fit, schedule, prediction, rows=512, seed=seed + 1)
    fresh = merge_loss(fit[:half], schedule, prediction, rows=64, fresh=True, seed=seed + 2)
    held = merge_loss(fit[half:], schedule, prediction, rows=512, seed=seed + 3)
    weights = {
        "uniform": merge_weights(ensemble, "uniform"),
        "greedy": merge_weights(ensemble, "greedy", fixed),
        "fitted": merge_weights(ensemble, "fitted", fresh, validation=held, steps=steps),
    }
    networks: dict[str, tuple[nn.Module, str]] = {BEST: (best, f"member {int(order[0])}")}
    for how, found in weights.items():
        networks[f"{how} merge"] = merge(ensemble, found), ", ".join(f"{w:.2f}" for w in found[""])
    if student is None and student_steps:
        from fastens.training.distillation import distill  # which imports this package

        trained = distill(
            ensemble,
            best,
            fit,
            schedule=schedule,
            prediction=prediction,
            steps=student_steps,
            learning_rate=2e-3,
            seed=seed,
            progress=progress,
        )
        student = trained.student
    if student is not None:
        networks[STUDENT] = student, f"distilled in {student_steps} steps" if student_steps else "as given"

    singles = {name: Ensemble([network]) for name, (network, _) in networks.items()}
    rows = {name: losses(single, test)[0] for name, single in singles.items()}
    rows[ENSEMBLE] = by_rule(ensemble)
    cost = _milliseconds({BEST: singles[BEST], ENSEMBLE: ensemble}, test, schedule, prediction)
    contenders = {name: Contender(rows[name], 1, cost[BEST], what) for name, (_, what) in networks.items()}
    if STUDENT in contenders:  # it may be of another structure
        both = _milliseconds({BEST: singles[BEST], STUDENT: singles[STUDENT]}, test, schedule, prediction)
        ratio = both[STUDENT] / both[BEST]
        contenders[STUDENT] = dataclasses.replace(contenders[STUDENT], milliseconds=cost[BEST] * ratio)
    contenders[ENSEMBLE] = Contender(rows[ENSEMBLE], len(kept), cost[ENSEMBLE], f"members {', '.join(map(str, kept))}")
    return MergeStudy(by_member, kept, contenders, weights)


@torch.no_grad()
def _milliseconds(
    models: dict[str, nn.Module], test: Tensor, schedule: Schedule, prediction: Any, rounds: int = 15
) -> dict[str, float]:
    """Medians of evaluations of 16 rows, interleaved."""
    denoisers = {name: Denoiser(model, schedule, prediction) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 3):
        for name, denoiser in denoisers.items():
            t = times_at(denoiser.schedule, torch.tensor(0.5, dtype=torch.float64))
            x = test[:16].to(denoiser.device)
            begun = time.perf_counter()
            denoiser.epsilon(x, t).cpu()
            if number >= 3:
                taken[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in taken.items()}


def _bootstrap(statistic: Callable[[Any], float], rows: int, draws: int = 1000) -> Interval:
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(rows, size=rows)) for _ in range(draws)]
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(float(statistic(np.arange(rows))), float(low), float(high))


def _percent(interval: Interval) -> str:
    return f"{interval.value:+.1f} % [{interval.low:+.1f}, {interval.high:+.1f}]"
