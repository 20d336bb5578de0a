"""A sampler that knows the members' densities along its way: true mixtures, equal densities, corrected products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import rules
from fastens.composition.particles import effective_size, langevin, mixed, systematic
from fastens.composition.path import Path
from fastens.composition.targets import And, Or
from fastens.draws import assigned_to
from fastens.ensemble import Ensemble
from fastens.evaluation.denoiser import Denoiser
from fastens.internal import is_fresh
from fastens.ops.normal import normal

_STEP, _PROBE, _MOVE, _ACCEPT, _RESAMPLE = (i << 20 for i in range(1, 6))  # draws of a sample, by their use
ACCEPTED = 0.6  # the share of accepted moves that the step size is led to


@dataclasses.dataclass(frozen=True)
class Superposed:
    """Samples, and what is known of them.

    Attributes:
        samples: [N, ...], at the schedule's time of least noise.
        log_densities: of each member at each sample, as noisy as that, float64 [K, N]; in nats.
        variance: of those, from the probes of divergences, [K, N]; zero under the SDE, where nothing is probed. Errors
            of finite steps are not in it.
        effective: the effective sample size before each resampling decision, a share of N, one for each step.
        resampled: how often the samples were resampled.
        accepted: the share of the corrector's moves that were accepted; 1 where none is refused.
    """

    samples: Tensor
    log_densities: Tensor
    variance: Tensor
    effective: list[float]
    resampled: int
    accepted: float


@torch.no_grad()
def superpose(
    denoiser: Denoiser,
    num: int,
    shape: Sequence[int],
    target: Or | And | rules.Product | None = None,
    *,
    noise: str = "sde",
    steps: int = 200,
    start: float | None = None,
    probes: int = 1,
    resample: float | None = None,
    corrector: str | None = None,
    corrector_steps: int = 1,
    seed: int = 0,
) -> Superposed:
    """Sample a composition of an ensemble's members, with their log-densities.

    Along the SDE a log-density follows from the score alone, ``d log p_k = s_k dy - |s_k|^2 du / 2``, Ito's estimator
    (Skreta et al., "The superposition of diffusion models using the Ito density estimator", ICLR 2025); along the ODE
    from its divergence besides, which one pass of all members estimates by a probe that is drawn anew at each step.

    A product of noised densities is not the noised product, so a sum of scores alone samples something else. What it
    lacks is a weight for each sample, ``d log w = (|S|^2 - sum_k w_k |s_k|^2) du / 2`` (Feynman and Kac; Skreta et al.,
    "Feynman-Kac correctors in diffusion", ICML 2025), by which ``resample`` draws the samples anew, and moves that
    leave the product at each noise level as it is, by ``corrector``. Powers of one density (``Product([beta])``) and
    guidance (``Product([scale, 1 - scale])`` of a conditional and an unconditional member) are products too.

    Args:
        denoiser: of a :class:`fastens.Ensemble`, whose members are composed.
        num: N.
        shape: of one sample.
        target: :class:`Or`, :class:`And`, or :class:`fastens.rules.Product`; none for the ensemble's rule.
        noise: ``"sde"`` or ``"ode"``.
        steps: in noise level; the ratio sigma / alpha falls by one factor in each.
        start: the ratio to begin from; none for the schedule's greatest. Products may begin lower, where data is still
            drowned: their weights wander from there on.
        probes: of each step's divergence, under the ODE.
        resample: of a product: resample where the effective sample size falls below this share of N, and at the end.
        corrector: of a product: ``"mala"`` or ``"langevin"`` after each step; the latter accepts every move.
        corrector_steps: how many.
        seed: of all noise.

    Raises:
        TypeError: another target; a denoiser of no ensemble.
        ValueError: numbers out of range; one member; weights of a product that do not fit, or whose sum is not above 0;
            resampling where rows have conditions or members of their own, or of what is no product; members that draw
            numbers (fresh dropout masks, training mode).
    """
    run = _Run(denoiser, num, tuple(shape), target, noise, steps, start, probes, resample, corrector, seed)
    return run.sampled(corrector_steps)


class _Run:
    def __init__(
        self,
        denoiser: Denoiser,
        num: int,
        shape: tuple[int, ...],
        target: Any,
        noise: str,
        steps: int,
        start: float | None,
        probes: int,
        resample: float | None,
        corrector: str | None,
        seed: int,
    ) -> None:
        target = denoiser.rule if target is None else target
        _check(denoiser, num, target, noise, probes, resample, corrector)
        self.target, self.seed, self.shape = target, seed, shape
        self.ode, self.probes, self.threshold, self.corrector = noise == "ode", probes, resample, corrector
        self.path = Path(denoiser, steps, start)
        self.numbers = torch.arange(num, device=denoiser.device)
        self.draws = 0
        u, size = self.path.u[0], math.prod(shape)
        deviation = math.sqrt(u)
        if self.is_product:
            self.levels = self._weights()
            total = self.levels.sum(1)
            if not bool((total > 0).all()):
                raise ValueError(
                    f"the product's weights sum to {float(total.min()):g}, and noise to that power is no density; take "
                    "weights whose sum is above 0 at every noise level"
                )
            deviation = math.sqrt(u / float(total[0]))
        self.y = deviation * self._normal(0)
        norm = self.y.square().flatten(1).sum(1)
        first = -0.5 * norm / u - 0.5 * size * math.log(2 * math.pi * u)
        self.log_densities = first.expand(denoiser.num_members, num).clone()
        self.variance = torch.zeros_like(self.log_densities)
        self.log_weights = torch.zeros_like(first)
        _check_deterministic(self.path, self.y[:2])

    @property
    def is_product(self) -> bool:
        return isinstance(self.target, rules.Product)

    def _weights(self) -> Tensor:
        """A product's weights at each level, float64 [levels, K]."""
        schedule, members = self.path.denoiser.schedule, self.path.denoiser.num_members
        rows = [self.target.at(float(schedule.log_snr(t))).weights or (1.0,) * members for t in self.path.times]
        return torch.tensor(rows, dtype=torch.float64, device=self.numbers.device)

    def _normal(self, draw: int) -> Tensor:
        return normal(self.seed, draw, self.numbers, self.shape).double()

    def sampled(self, corrector_steps: int) -> Superposed:
        """Go down all levels."""
        path, effective, resampled, moves, accepted, step = self.path, [], 0, 0, 0.0, 1.0
        last = len(path.u) - 2
        scores: Tensor | None = None
        for i in range(last + 1):
            if self.ode:
                self._ode_step(i)
            else:
                self._sde_step(i, scores)
            if not self.is_product:
                continue
            self.log_weights = self.log_weights + mixed(self.levels[i + 1] - self.levels[i], self.log_densities)
            effective.append(effective_size(self.log_weights))
            if self.threshold is not None and (effective[-1] < self.threshold or i == last):
                self._resample(i)
                resampled += 1
            if self.corrector is not None:
                scores = path.scores(self.y, i + 1)
                for m in range(corrector_steps):
                    scores, share = self._corrected(i, m, corrector_steps, scores, step)
                    moves, accepted = moves + 1, accepted + share
                    step *= math.exp(0.5 * (share - ACCEPTED)) if self.corrector == "mala" else 1.0
        samples = (path.alpha(last + 1) * self.y).to(torch.promote_types(path.dtype, torch.float32))
        share = accepted / moves if moves else 1.0
        return Superposed(samples, self.log_densities, self.variance, effective, resampled, share)

    def _sde_step(self, i: int, scores: Tensor | None) -> None:
        """The step of Euler and Maruyama from level i, where the scores may be known."""
        u, then = self.path.u[i], self.path.u[i + 1]
        span = u - then
        scores = self.path.scores(self.y, i) if scores is None else scores
        noise = math.sqrt(span) * self._normal(_STEP + i)
        own = (scores * noise).flatten(2).sum(2) - 0.5 * span * scores.square().flatten(2).sum(2)
        shares = self._shares(i, scores, self.log_densities, self.log_densities + own, span)
        drift = mixed(shares, scores)
        if self.is_product:
            self._weigh(i, span, scores, drift)
        self.log_densities = self.log_densities + own + span * (scores * drift).flatten(2).sum(2)
        self.y = self.y + span * drift + noise

    def _weigh(self, i: int, span: float, scores: Tensor, drift: Tensor) -> None:
        square = drift.square().flatten(1).sum(1) - mixed(self.levels[i], scores.square().flatten(2).sum(2))
        self.log_weights = self.log_weights + 0.5 * span * square

    def _ode_step(self, i: int) -> None:
        """Heun's step of samples, log-densities and weights together; both stages see one probe."""
        span = self.path.u[i] - self.path.u[i + 1]
        probes = torch.stack([self._normal(_PROBE + i * self.probes + p).sign() for p in range(self.probes)])
        y, log_densities = self.y, self.log_densities
        first, second = None, None
        for stage in (i, i + 1):
            scores, divergence, variance = self.path.scores_along(y, stage, probes)
            rate = -0.5 * (divergence + scores.square().flatten(2).sum(2))
            reached = log_densities + span * rate
            drift = mixed(self._shares(stage, scores, log_densities, reached, 0.5 * span), scores)
            rate = rate + 0.5 * (scores * drift).flatten(2).sum(2)
            first, second = second, (drift, rate, variance, scores)
            if stage == i:
                y, log_densities = y + 0.5 * span * drift, log_densities + span * rate
        assert first is not None
        assert second is not None
        if self.is_product:
            for level, (drift, _, _, scores) in ((i, first), (i + 1, second)):
                self._weigh(level, 0.5 * span, scores, drift)
        self.y = self.y + 0.25 * span * (first[0] + second[0])
        self.log_densities = self.log_densities + 0.5 * span * (first[1] + second[1])
        deviation = 0.5 * (first[2].sqrt() + second[2].sqrt())  # of one probe: the stages err together
        self.variance = self.variance + (0.5 * span * deviation).square()

    def _shares(self, i: int, scores: Tensor, now: Tensor, reached: Tensor, gain: float) -> Tensor:
        """How much of each member's score is taken at level i, [K, B] or [K], by the log-densities there and after."""
        if isinstance(self.target, Or):
            return self.target.shares(now)
        if isinstance(self.target, And):
            flat = scores.flatten(2).transpose(0, 1)
            return self.target.shares(flat @ flat.mT, reached, gain)
        return self.levels[i]

    def _resample(self, i: int) -> None:
        index = systematic(self.log_weights, self.seed, _RESAMPLE + i)
        self.y, self.log_weights = self.y[index], torch.zeros_like(self.log_weights)
        self.log_densities, self.variance = self.log_densities[:, index], self.variance[:, index]

    def _corrected(self, i: int, m: int, each: int, scores: Tensor, step: float) -> tuple[Tensor, float]:
        """One move at level i + 1; the members' scores after it, and the share of samples that took it."""
        weights = self.levels[i + 1]
        size = step * self.path.u[i + 1] / float(weights.abs().sum()) / math.prod(self.shape) ** (1 / 3)
        draw = i * each + m
        uniform = None
        if self.corrector == "mala":
            uniform = torch.special.ndtr(normal(self.seed, _ACCEPT + draw, self.numbers, (1,)).double())[:, 0]
        self.y, scores, gained, accepted = langevin(
            self.y,
            scores,
            weights,
            lambda y: self.path.scores(y, i + 1),
            size,
            self._normal(_MOVE + draw),
            uniform,
        )
        self.log_densities = self.log_densities + gained
        return scores, float(accepted.double().mean())


def _check(
    denoiser: Denoiser, num: int, target: Any, noise: str, probes: int, resample: float | None, corrector: str | None
) -> None:
    if not isinstance(denoiser.model, Ensemble):
        raise TypeError(f"superpose: the model is a {type(denoiser.model).__name__}, expected a fastens.Ensemble")
    members = denoiser.num_members
    if not isinstance(target, Or | And | rules.Product):
        raise TypeError(f"superpose: target is {target!r}, expected Or, And or fastens.rules.Product")
    if isinstance(target, rules.Product):
        target.check(members)
    elif members < 2:
        raise ValueError(f"superpose: {target} composes members, and there is one")
    if isinstance(target, Or) and target.weights is not None and len(target.weights) != members:
        raise ValueError(f"superpose: {target} has {len(target.weights)} weights, expected one per member, {members}")
    if noise not in ("sde", "ode"):
        raise ValueError(f"noise {noise!r} is unknown, expected 'sde' or 'ode'")
    if min(num, probes) < 1:
        raise ValueError(f"num is {num} and probes {probes}, expected at least 1 of each")
    if corrector not in (None, "mala", "langevin"):
        raise ValueError(f"corrector {corrector!r} is unknown, expected 'mala' or 'langevin'")
    if (corrector is not None or resample is not None) and not isinstance(target, rules.Product):
        raise ValueError(f"superpose: resample and corrector are of products; {target} needs neither")
    if assigned_to(denoiser.model) is not None:
        raise ValueError("superpose: members are assigned to rows, and a composition is of all; leave ens.assigned")
    if resample is not None:
        if noise == "ode" and corrector is None:
            raise ValueError(
                "resampling makes copies, and under noise='ode' copies stay equal; take noise='sde', or a corrector"
            )
        if not 0 < resample <= 1:
            raise ValueError(f"resample is {resample}, expected a share of the samples, above 0 and at most 1")
        for name, value in denoiser.conditioning.items():
            rows = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.ndim and x.shape[0] == num]
            if rows and num > 1:
                raise ValueError(
                    f"resampling moves samples between rows, and {name!r} has a value for each of {num} rows, so that "
                    "a sample would go on under the condition of another; sample each condition by itself, as [1, ...]"
                )


def _check_deterministic(path: Path, y: Tensor) -> None:
    """Raise where the members draw numbers: a log-density along the path is of one field."""
    model: Any = path.denoiser.model
    if is_fresh(model) or not torch.equal(path.scores(y, 0), path.scores(y, 0)):
        raise ValueError(
            "superpose: the members give two results for one input, so they have no log-density along the path; put "
            "them in evaluation mode (ens.eval()), or take MC Dropout with masks='fixed'"
        )
