"""Whole runs of a sampler: DDIM, Euler and Heun, step by step, or on a GPU as a few recorded graphs.

Every step is linear in the state x and in what the network predicts, so a schedule becomes a table of coefficients,
once and in float64; a step reads its row, and is one kernel (:mod:`fastens.ops.sampler_step`). Noise, and members and
masks that are drawn, come from counters: sample i is a function of the seed and i alone, and recorded steps draw what
eager ones draw.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastens import capture
from fastens.device import device_of
from fastens.draws import assigned_to
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.ode import time_grid
from fastens.internal import engine_of
from fastens.ops.normal import normal, number_on
from fastens.ops.sampler_step import sampler_step
from fastens.schedules.schedulers import ddim_steps, described, prediction_of

__all__ = ["Sampler"]

METHODS = ("ddim", "euler", "heun")
_End = Tensor | tuple[float, float]  # a time, or alpha and sigma themselves
_DATA: _End = (1.0, 0.0)
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
        times: instead of it, the steps + 1 times of the schedule, from most noise to least; or, for DDIM, a DDIM
            scheduler of diffusers after its ``set_timesteps``, whose own steps are then taken: they may end where the
            next does not begin (linspace, trailing that does not divide), or short of the data (set_alpha_to_one).
        eta: of DDIM: 0 is deterministic, 1 ancestral.
        clip: of DDIM: what the predicted data is held in, before the noise is found in it (in diffusers' pipelines:
            ``use_clipped_model_output``); the last step then ends in it. None to leave it.
        to_data: of DDIM: the last step ends in the data that the network predicts, and not at a last time, whose noise
            is left; ``times`` are then one per step, each of which ends where the next begins.

    Raises:
        ValueError: an unknown method, too few steps or times, times that lead to more noise, eta out of [0, 1], eta,
            clip, to_data or a scheduler for another method, a scheduler that contradicts the denoiser or clips
            otherwise, or coefficients that are not finite at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        method: str = "ddim",
        *,
        steps: int = 50,
        times: Any = None,
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
        if hasattr(times, "set_timesteps"):
            _check_scheduler(times, denoiser, method, clip, to_data)
            grid, ends = _steps_of(times)
        else:
            grid, ends = _grid(denoiser, steps, times, to_data)
        self.num_steps = len(ends)
        self._start_std = denoiser.schedule.start_std(grid[0])
        self._ends_in_data = times is None or isinstance(ends[-1], Tensor) or ends[-1][1] == 0
        table, self._network_times = _coefficients(denoiser, method, grid, ends, eta, clip is not None)
        silent = isinstance(ends[-1], Tensor) and float(denoiser.schedule.sigma(ends[-1])) == 0
        self._last_is_euler = method == "heun" and (silent or not bool(torch.isfinite(table[-1]).all()))
        if self._last_is_euler:
            table[-1] = _coefficients(denoiser, "euler", grid[-1:], ends[-1:], 0.0, False)[0][0]
        if not torch.isfinite(table).all():
            step = int((~torch.isfinite(table)).any(1).nonzero()[0])
            raise ValueError(
                f"step {step}, from time {grid[step]:g}, has no finite coefficients for prediction "
                f"{denoiser.prediction.kind!r}: the schedule has no data or no noise there; begin elsewhere (times=); "
                "v, x0 and flow are finite without data"
            )
        self._table = table
        self._moved: dict[Any, tuple[Tensor, ...]] = {}
        self._recordings: dict[Any, _RecordedRun] = {}

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
        numbers = samples if isinstance(samples, Tensor) else torch.arange(samples)
        numbers = numbers.to(device)
        x = self._start_std * normal(seed, 0, numbers, tuple(shape)).to(self._dtype)
        recorded = self._recordings.get((len(numbers), *shape))
        if recorded is not None and recorded.is_current(self.denoiser):
            return recorded(self, x, numbers, seed)
        seeds = number_on(seed, device)
        with self._drawn(samples, seed):
            for i in range(self.num_steps):
                last = i == self.num_steps - 1
                x = self._run(x, *self._rows(i, 1, x), numbers, seeds, torch.full_like(seeds, i), last)
        return x

    def capture(self, batch_size: int, shape: Sequence[int]) -> None:
        """Record the run of so many samples of a shape as a few CUDA graphs; calls of that size replay them.

        The recordings read the weights where they are. After a change of the weights, of the rule or of training mode
        they are not replayed any more: record again. Under another autocast or precision the run goes step by step.
        After a change that torch does not count, such as by ``.data``, record again too.

        Raises:
            RuntimeError: the model is not on a CUDA device.
            ValueError: training mode, a rule that draws members or fresh dropout masks, which no recording draws anew:
                such runs go step by step, and the launches of each step replay as a graph by themselves.
        """
        if not device_of(self.denoiser.device).launches:
            raise RuntimeError(f"capture: the model is on {self.denoiser.device}, expected a CUDA device")
        with torch.inference_mode(False), torch.no_grad():  # later calls write to what a recording keeps
            self._record(batch_size, tuple(shape))

    @torch.no_grad()
    def _record(self, batch_size: int, shape: tuple[int, ...]) -> None:
        model = self.denoiser.model
        engine = engine_of(model)
        if model.training:
            raise ValueError("capture: the model is in training mode, expected evaluation; call .eval() first")
        if self.denoiser.rule.random or (engine is not None and engine.kind.fresh):
            raise ValueError("capture: a rule that draws members, or fresh masks, differ at each evaluation")
        if assigned_to(model) is not None:
            raise ValueError("capture: members are assigned to rows in this context alone; leave ens.assigned")
        x = torch.zeros(batch_size, *shape, dtype=self._dtype, device=self.denoiser.device)
        self._predict(x, self._rows(0, 1, x)[1][0, 0])  # checks fold against loop, which no recording can
        ordinary = self.num_steps - 1  # the last step may be of another kind
        whole = min(RECORDED_STEPS, max(ordinary, 1))
        parts = [(whole, ordinary // whole, False), (ordinary % whole, 1, False), (1, 1, True)]
        run = _RecordedRun(self)  # knows the state before: where a recording changes it, none is replayed
        run.parts = [_Recording(self, x, steps, replays, last) for steps, replays, last in parts if steps and replays]
        self._recordings[(batch_size, *shape)] = run

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the state: the network's, but at least float32, or steps would round it away."""
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
            kind = "linear" if self.clip is None else "data" if ends and self._ends_in_data else "clipped"
            noise: dict[str, Any] = {}
            if draws is not None and kind != "data":
                noise = {"seed": seed, "offset": draws[i], "samples": numbers}
            x = sampler_step(x, output, row, kind, clip=self.clip or (), **noise)
        return x

    def _predict(self, x: Tensor, network_time: Tensor) -> Tensor:
        return self.denoiser.predict(x.to(self._network_dtype), network_time)

    def _drawn(self, samples: int | Tensor, seed: int) -> contextlib.AbstractContextManager[None]:
        model: Any = self.denoiser.model
        scope = getattr(model, "trajectory", None)
        if scope is None:
            return contextlib.nullcontext()
        return scope(len(samples), seed, samples=samples) if isinstance(samples, Tensor) else scope(samples, seed)


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

        self.replay, self.output = capture.record_graph(run, device)

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


class _RecordedRun:
    """A whole run as graphs, which one caller at a time replays."""

    def __init__(self, sampler: Sampler) -> None:
        self.parts: list[_Recording] = []
        self._device = sampler.denoiser.device
        self._facts = capture.Facts(sampler.denoiser.model)
        self._state = self._state_of(sampler.denoiser)
        self._lock = threading.Lock()
        self._turns = device_of(self._device).turns()

    def _state_of(self, denoiser: Denoiser) -> Any:
        modes = [module.training for module in denoiser.model.modules()]
        return denoiser.rule, modes, capture.settings(self._device.type)

    def is_current(self, denoiser: Denoiser) -> bool:
        """Whether the model has the weights, state, modes and rule that were recorded, under the same settings."""
        if assigned_to(denoiser.model) is not None or not capture.may_replay(self._device.type):
            return False
        return self._state_of(denoiser) == self._state and self._facts.hold(denoiser.model)

    def __call__(self, sampler: Sampler, x: Tensor, numbers: Tensor, seed: int) -> Tensor:
        """Replay from the state ``x`` on; return the samples in memory of their own."""
        with self._lock, self._turns:
            first = 0
            for part in self.parts:
                for _ in range(part.replays):
                    x = part(x, sampler._rows(first, part.steps, x), numbers, seed, first)
                    first += part.steps
            return x.clone()


def _default_times(denoiser: Denoiser, steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    schedule = denoiser.schedule
    if schedule.name == "edm":
        return time_grid(schedule, steps).flip(0)
    return torch.linspace(schedule.t_prior, schedule.t_data, steps + 1, dtype=torch.float64)


def _grid(denoiser: Denoiser, steps: int, times: Any, to_data: bool) -> tuple[Tensor, list[_End]]:
    """The times that steps begin at, [n], and the n ends of them: each is where the next begins."""
    grid = _default_times(denoiser, steps) if times is None else torch.as_tensor(times, dtype=torch.float64).cpu()
    if grid.ndim != 1 or len(grid) < (1 if to_data and times is not None else 2):
        raise ValueError(f"times is {list(grid.shape)}, expected at least {'one' if to_data else 'two'}")
    rising = (denoiser.schedule.log_snr(grid).diff() < 0).nonzero()
    if len(rising):
        at = int(rising[0])
        raise ValueError(
            f"times go from {grid[at]:g} to {grid[at + 1]:g}, where there is more noise; expected times of "
            f"{denoiser.schedule.name!r} from most noise to least, as from {denoiser.schedule.t_prior:g} to "
            f"{denoiser.schedule.t_data:g}"
        )
    if not to_data:
        return grid[:-1], list(grid[1:])
    return (grid, [*grid[1:], _DATA]) if times is not None else (grid[:-1], [*grid[1:-1], _DATA])


def _steps_of(scheduler: Any) -> tuple[Tensor, list[_End]]:
    """The same of a DDIM scheduler, which says alpha and sigma where a step ends."""
    grid, kept = ddim_steps(scheduler)
    return grid, [(float(alpha), float(sigma)) for alpha, sigma in zip(kept.sqrt(), (1 - kept).sqrt(), strict=True)]


def _check_scheduler(scheduler: Any, denoiser: Denoiser, method: str, clip: Any, to_data: bool) -> None:
    """Raise unless the sampler takes the scheduler's steps when it takes its times."""
    if method != "ddim" or to_data:
        raise ValueError(
            "times is a scheduler, which is of 'ddim' and says itself how its last step ends, without to_data"
        )
    denoiser.prediction.with_(prediction_of(scheduler), "the denoiser", described(scheduler))
    config = scheduler.config
    if config.get("thresholding"):
        raise ValueError(
            "the scheduler thresholds the data (thresholding=True), which no method here does; set it to False"
        )
    bound = config.get("clip_sample_range", 1.0)
    clips = config.get("clip_sample") and not type(scheduler).__name__.startswith("CogVideoX")  # those never do
    wanted = (-bound, bound) if clips else None
    if clip != wanted:
        raise ValueError(
            f"clip is {clip}, but the scheduler's clip_sample={bool(wanted)} says {wanted}: pass clip={wanted} (the "
            "noise is then found in clipped data, as with use_clipped_model_output=True), or a scheduler that agrees"
        )


def _coefficients(
    denoiser: Denoiser, method: str, grid: Tensor, ends: Sequence[_End], eta: float, clipped: bool
) -> tuple[Tensor, Tensor]:
    """What each step multiplies, float64 [steps, 5], and the network's times [steps, stages].

    DDIM: x' = r0 x + r1 output + r2 noise; clipped: data = r3 x + r4 output, x' = r0 x + r1 data + r2 noise. Euler: x'
    = r0 x + r1 output. Heun: that is x1, and x' = r2 x + r3 output + r4 output1.
    """
    schedule = denoiser.schedule
    rows, times = [], []
    for now, end in zip(grid, ends, strict=True):
        if method == "ddim":
            times.append(schedule.network_time(now).double().reshape(1))
            then = end if isinstance(end, tuple) else (float(schedule.alpha(end)), float(schedule.sigma(end)))
            rows.append(_ddim(denoiser, now, then, eta, clipped))
            continue
        assert isinstance(end, Tensor)
        stages = (now, end) if method == "heun" else (now,)
        times.append(torch.stack([schedule.network_time(t).double() for t in stages]))
        span = float(end - now)
        of_x, of_output = denoiser.factors("flow", now)  # the velocity of the probability flow
        row = [1 + span * of_x, span * of_output, 0.0, 0.0, 0.0]
        if method == "heun":
            x_then, output_then = denoiser.factors("flow", end)
            half = span / 2
            row[2:] = [
                1 + half * (of_x + x_then * row[0]),
                half * (of_output + x_then * row[1]),
                half * output_then,
            ]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64), torch.stack(times)


def _ddim(denoiser: Denoiser, now: Tensor, then: tuple[float, float], eta: float, clipped: bool) -> list[float]:
    """A row of the table, for a step to alpha and sigma ``then``."""
    alpha, sigma = float(denoiser.schedule.alpha(now)), float(denoiser.schedule.sigma(now))
    alpha_then, sigma_then = then
    if sigma == 0:
        return [float("nan")] * 5
    remaining = max(0.0, 1 - (alpha * sigma_then / (alpha_then * sigma)) ** 2) if alpha_then else 0.0
    fresh = eta * sigma_then * remaining**0.5
    kept = max(0.0, sigma_then**2 - fresh**2) ** 0.5
    data_of_x, data_of_output = denoiser.factors("x0", now)
    if clipped:
        return [kept / sigma, alpha_then - kept * alpha / sigma, fresh, data_of_x, data_of_output]
    noise_of_x, noise_of_output = denoiser.factors("epsilon", now)
    return [
        alpha_then * data_of_x + kept * noise_of_x,
        alpha_then * data_of_output + kept * noise_of_output,
        fresh,
        0.0,
        0.0,
    ]
