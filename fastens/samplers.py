"""Whole runs of a sampler: DDIM, Euler and Heun, step by step, or on a GPU as a few recorded graphs.

Every step is linear in the state x and in what the network predicts, so a schedule becomes a table of coefficients,
once and in float64; a step reads its row, and is one kernel (:mod:`fastens.ops.sampler_step`). Noise comes from
counters: sample i is a function of the seed and i alone, and recorded steps draw what eager ones draw.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastens import capture
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.ode import time_grid
from fastens.ops.normal import normal, number_on
from fastens.ops.sampler_step import sampler_step

METHODS = ("ddim", "euler", "heun")
RECORDED_STEPS = 20  # steps in one graph, which is replayed with other coefficients


class Sampler:
    """A sampler of a model or ensemble under a schedule; called with numbers of samples, it runs from noise to samples.

    ``"ddim"`` is Song et al., "Denoising diffusion implicit models" (ICLR 2021); ``"euler"`` and ``"heun"`` solve the
    probability-flow ODE in the schedule's own time, which for EDM's is sigma (Karras et al., NeurIPS 2022, algorithm
    1). Heun's last step is Euler's where its end has no noise.

    Args:
        denoiser: the model, its schedule and what it predicts.
        method: one of METHODS.
        steps: of the default grid of times, even, or in the logarithm of sigma for EDM.
        times: instead of it, the steps + 1 times of the schedule, from most noise to least.
        eta: of DDIM: 0 is deterministic, 1 ancestral.
        clip: of DDIM: what the predicted data is held in; the last step then ends in it. None to leave it.
        to_data: of DDIM: the last step ends in the data that the network predicts, and not at a last time, whose noise
            is left; ``times`` are then one per step, such as the ``timesteps`` of a scheduler of diffusers.

    Raises:
        ValueError: an unknown method, too few steps or times, eta out of [0, 1], eta, clip or to_data for another
            method, or coefficients that are not finite at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        method: str = "ddim",
        *,
        steps: int = 50,
        times: Sequence[float] | Tensor | None = None,
        eta: float = 0.0,
        clip: tuple[float, float] | None = None,
        to_data: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta:g}, expected 0 to 1")
        if method != "ddim" and (eta or clip is not None or to_data):
            raise ValueError(f"eta, clip and to_data are of 'ddim'; {method!r} has none of them")
        self.denoiser = denoiser
        self.method, self.clip, self.stochastic = method, clip, eta > 0
        grid = _default_times(denoiser, steps) if times is None else torch.as_tensor(times, dtype=torch.float64)
        if to_data and times is not None:
            grid = torch.cat([grid, grid[-1:]])  # where the last step ends is no time
        if grid.ndim != 1 or len(grid) < 2:
            raise ValueError(f"times is {list(grid.shape)}, expected at least {'one' if to_data else 'two'}")
        self.num_steps = len(grid) - 1
        table, self._network_times = _coefficients(denoiser, method, grid.cpu(), eta, clip is not None, to_data)
        self._last_is_euler = method == "heun" and not bool(torch.isfinite(table[-1]).all())
        if self._last_is_euler:
            table[-1] = _coefficients(denoiser, "euler", grid[-2:].cpu(), 0.0, False, False)[0][0]
        if not torch.isfinite(table).all():
            step = int((~torch.isfinite(table)).any(1).nonzero()[0])
            raise ValueError(f"the step from time {grid[step]:g} to {grid[step + 1]:g} has no finite coefficients")
        self._table = table
        self._moved: dict[Any, tuple[Tensor, ...]] = {}
        self._recordings: dict[Any, list[_Recording]] = {}

    @torch.no_grad()
    def __call__(self, samples: int | Tensor, shape: Sequence[int], seed: int = 0) -> Tensor:
        """Sample.

        Args:
            samples: how many, numbered from 0, or their numbers, int64 [B].
            shape: of one sample.
            seed: of all noise, and of members that random rules draw.

        Returns:
            [B, *shape] on the model's device, float32, or float64 where the model is.
        """
        device = self.denoiser.device
        numbers = torch.arange(samples) if isinstance(samples, int) else samples
        numbers = numbers.to(device)
        x = self.denoiser.schedule.prior_std * normal(seed, 0, numbers, tuple(shape)).to(self._dtype)
        recordings = self._recordings.get((len(numbers), *shape))
        if recordings is not None and all(recording.is_current(self.denoiser) for recording in recordings):
            first = 0
            for recording in recordings:
                for _ in range(recording.replays):
                    x = recording(x, self._rows(first, recording.steps, x), numbers, seed, first)
                    first += recording.steps
            return x.clone()
        seeds = number_on(seed, device)
        with self._drawn(len(numbers), seed):
            for i in range(self.num_steps):
                last = i == self.num_steps - 1
                x = self._run(x, *self._rows(i, 1, x), numbers, seeds, torch.full_like(seeds, i), last)
        return x

    def capture(self, batch_size: int, shape: Sequence[int]) -> None:
        """Record the run of so many samples of a shape as a few CUDA graphs; calls of that size replay them.

        The recordings read the weights where they are. After a change of the weights, or of the rule, they are not
        replayed any more: record again. After a change that torch does not count, such as by ``.data``, do so too.

        Raises:
            RuntimeError: the model is not on a CUDA device.
            ValueError: training mode, a rule that draws members or fresh dropout masks, which no recording draws anew:
                such runs go step by step, and the launches of each step replay as a graph by themselves.
        """
        if self.denoiser.device.type != "cuda":
            raise RuntimeError(f"capture: the model is on {self.denoiser.device}, expected a CUDA device")
        with torch.inference_mode(False), torch.no_grad():  # later calls write to what a recording keeps
            self._record(batch_size, tuple(shape))

    @torch.no_grad()
    def _record(self, batch_size: int, shape: tuple[int, ...]) -> None:
        model = self.denoiser.model
        masks = getattr(getattr(model, "_engine", None), "masks", None)
        if model.training:
            raise ValueError("capture: the model is in training mode, expected evaluation; call .eval() first")
        if self.denoiser.rule.random or getattr(masks, "fresh", False):
            raise ValueError("capture: a rule that draws members, or fresh masks, differ at each evaluation")
        x = torch.zeros(batch_size, *shape, dtype=self._dtype, device=self.denoiser.device)
        self._predict(x, self._rows(0, 1, x)[1][0, 0])  # checks fold against loop, which no recording can
        ordinary = self.num_steps - 1  # the last step may be of another kind
        whole = min(RECORDED_STEPS, max(ordinary, 1))
        parts = [(whole, ordinary // whole, False), (ordinary % whole, 1, False), (1, 1, True)]
        self._recordings[(batch_size, *shape)] = [
            _Recording(self, x, steps, replays, last) for steps, replays, last in parts if steps and replays
        ]

    @property
    def _dtype(self) -> torch.dtype:
        """Of the state: that of the network, but at least float32."""
        return torch.promote_types(self._network_dtype, torch.float32)

    @property
    def _network_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.denoiser.model.parameters() if p.is_floating_point()), torch.float32)

    def _rows(self, first: int, steps: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [steps, n] and the network's times [steps, stages, B] of some steps."""
        kind = (x.device, x.dtype)
        if kind not in self._moved:  # once: a copy from the host in every step would wait for it
            self._moved[kind] = tuple(t.to(*kind) for t in (self._table, self._network_times))
        table, times = (t[first : first + steps] for t in self._moved[kind])
        return table, times.unsqueeze(-1).expand(*times.shape, len(x))

    def _run(
        self, x: Tensor, table: Tensor, times: Tensor, numbers: Tensor, seed: Tensor, first: Tensor, last: bool
    ) -> Tensor:
        """Take as many steps as ``table`` has rows; ``last`` where the run ends with the last of them."""
        draws = torch.arange(1, len(table) + 1, device=x.device) + first if self.stochastic else None
        for i, (row, at) in enumerate(zip(table, times, strict=True)):
            ends = last and i == len(table) - 1
            output = self._predict(x, at[0])
            if self.method == "heun" and not (ends and self._last_is_euler):
                moved = sampler_step(x, output, row)
                x = sampler_step(x, output, row, "corrected", second=self._predict(moved, at[1]))
                continue
            kind = "linear" if self.clip is None else "data" if ends else "clipped"
            drawn = draws is not None and kind != "data"
            noise = {"seed": seed, "offset": draws[i], "samples": numbers} if drawn else {}
            x = sampler_step(x, output, row, kind, clip=self.clip or (), **noise)
        return x

    def _predict(self, x: Tensor, network_time: Tensor) -> Tensor:
        return self.denoiser.predict(x.to(self._network_dtype), network_time)

    def _drawn(self, batch_size: int, seed: int) -> contextlib.AbstractContextManager[None]:
        model: Any = self.denoiser.model
        scope = getattr(model, "trajectory", None)
        return contextlib.nullcontext() if scope is None else scope(batch_size, seed)


class _Recording:
    """Some steps as one graph: what it reads is copied in, and the state is read from where it is left."""

    def __init__(self, sampler: Sampler, x: Tensor, steps: int, replays: int, last: bool) -> None:
        self.steps, self.replays = steps, replays
        device = x.device
        self.x = x.clone()
        first = sampler.num_steps - 1 if last else 0
        self.table, self.times = (rows.clone() for rows in sampler._rows(first, steps, x))
        self.numbers = torch.zeros(len(x), dtype=torch.int64, device=device)
        self.seed, self.first = (torch.zeros((), dtype=torch.int64, device=device) for _ in "sf")

        def run() -> Tensor:
            return sampler._run(self.x, self.table, self.times, self.numbers, self.seed, self.first, last)

        self.weights = capture.Weights(_tensors_of(sampler.denoiser.model))
        self.rule = sampler.denoiser.rule
        self.replay, self.output = capture.record_graph(run, device)

    def is_current(self, denoiser: Denoiser) -> bool:
        """Whether the model has the weights and the rule that were recorded."""
        return self.rule == denoiser.rule and self.weights.are(_tensors_of(denoiser.model))

    def __call__(self, x: Tensor, rows: tuple[Tensor, Tensor], numbers: Tensor, seed: int, first: int) -> Tensor:
        """Replay on the state ``x``; the result is the recording's own, until the next replay."""
        self.x.copy_(x)
        self.table.copy_(rows[0])
        self.times.copy_(rows[1])
        self.numbers.copy_(numbers)
        self.seed.copy_(number_on(seed, self.seed.device))
        self.first.fill_(first)
        self.replay()
        return self.output


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _default_times(denoiser: Denoiser, steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    schedule = denoiser.schedule
    if schedule.name == "edm":
        return time_grid(schedule, steps).flip(0)
    return torch.linspace(schedule.t_prior, schedule.t_data, steps + 1, dtype=torch.float64)


def _coefficients(
    denoiser: Denoiser, method: str, grid: Tensor, eta: float, clipped: bool, to_data: bool
) -> tuple[Tensor, Tensor]:
    """What each step multiplies, float64 [steps, 5], and the network's times [steps, stages].

    DDIM: x' = r0 x + r1 output + r2 noise; clipped: data = r3 x + r4 output, x' = r0 x + r1 data + r2 noise. Euler: x'
    = r0 x + r1 output. Heun: that is x1, and x' = r2 x + r3 output + r4 output1.
    """
    schedule = denoiser.schedule
    rows, times = [], []
    for i, (now, then) in enumerate(itertools.pairwise(grid)):
        ends = (now, then) if method == "heun" else (now,)
        times.append(torch.stack([schedule.network_time(t).double() for t in ends]))
        if method == "ddim":
            rows.append(_ddim(denoiser, now, None if to_data and i == len(grid) - 2 else then, eta, clipped))
            continue
        span = float(then - now)
        of_x, of_output = _velocity(denoiser, now)
        row = [1 + span * of_x, span * of_output, 0.0, 0.0, 0.0]
        if method == "heun":
            x_then, output_then = _velocity(denoiser, then)
            half = span / 2
            row[2:] = [
                1 + half * (of_x + x_then * row[0]),
                half * (of_output + x_then * row[1]),
                half * output_then,
            ]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64), torch.stack(times)


def _ddim(denoiser: Denoiser, now: Tensor, then: Tensor | None, eta: float, clipped: bool) -> list[float]:
    """A row of the table; ``then`` is none for the data, without noise."""
    schedule = denoiser.schedule
    (alpha, sigma), (alpha_then, sigma_then) = (
        (1.0, 0.0) if t is None else (float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (now, then)
    )
    remaining = max(0.0, 1 - (alpha * sigma_then / (alpha_then * sigma)) ** 2)
    fresh = eta * sigma_then * remaining**0.5
    kept = max(0.0, sigma_then**2 - fresh**2) ** 0.5
    noise_of_x, noise_of_output = _noise_found(denoiser, now)
    data_of_x, data_of_output = (1 - sigma * noise_of_x) / alpha, -sigma * noise_of_output / alpha
    if clipped:
        return [kept / sigma, alpha_then - kept * alpha / sigma, fresh, data_of_x, data_of_output]
    return [
        alpha_then * data_of_x + kept * noise_of_x,
        alpha_then * data_of_output + kept * noise_of_output,
        fresh,
        0.0,
        0.0,
    ]


def _noise_found(denoiser: Denoiser, t: Tensor) -> tuple[float, float]:
    """The factors of x and of the network's output in the noise that it finds: both are linear in it."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return float(denoiser.to_epsilon(zero, one, t)), float(denoiser.to_epsilon(one, zero, t))


def _velocity(denoiser: Denoiser, t: Tensor) -> tuple[float, float]:
    """The factors of x and of the network's output in the velocity of the probability flow."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    of_x, of_output = _noise_found(denoiser, t)
    of_noise = float(denoiser.velocity(one, zero, t))
    return float(denoiser.velocity(zero, one, t)) + of_noise * of_x, of_noise * of_output
