"""A student of one member's size that predicts what an ensemble does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.loss import times_at
from fastens.evaluation.progress import Progress
from fastens.modes import evaluating, in_mode
from fastens.schedules import Prediction


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What :func:`distill` returns.

    Attributes:
        student: a module of the student's class in evaluation mode, the moving average of its weights.
        losses: mean squared difference from the ensemble's noise of every hundred steps.
    """

    student: nn.Module
    losses: list[float]


class _Frozen(torch.autograd.Function):
    """What a denoiser finds in x, whose gradient goes to x, and never to the denoiser's weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, denoiser: Denoiser) -> Tensor:
        """Keep the graph for the way back."""
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.found = denoiser.epsilon(ctx.x, t)
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # its one gradient
        """Go back through it."""
        (to_x,) = torch.autograd.grad(ctx.found, ctx.x, gradient)
        return to_x, None, None


def score_matching(
    teacher: Denoiser, student: Denoiser, x: Tensor, t: Tensor, *, through: bool = False
) -> tuple[Tensor, Tensor]:
    """The noise that a frozen ensemble finds in ``x`` under its rule, and that which a student finds.

    Their squared difference is the score matching of a student; of a generator that makes ``x`` in one step their
    difference is what it is trained by: along ``x`` alone (distribution matching, Yin et al., arXiv 2311.18828), or
    with the teacher's own derivative (``through``), which score identity and score implicit matching need (Zhou et al.,
    arXiv 2404.04057; Luo et al., arXiv 2410.16794).

    Args:
        teacher: of the ensemble; no gradient reaches its weights.
        student: of any network under a schedule.
        x: noisy samples [B, ...].
        t: time of the teacher's schedule, one or one per sample [B].
        through: let gradients pass through the ensemble to ``x``; else it is evaluated without, and planned.

    Returns:
        The teacher's and the student's, [B, ...] each.
    """
    if through and torch.is_grad_enabled() and x.requires_grad:
        theirs: Any = _Frozen.apply(x, t, teacher)
    else:
        with torch.no_grad():
            theirs = teacher.epsilon(x.detach(), t)
    return theirs, student.epsilon(x, t)


def distill(
    ensemble: nn.Module,
    student: nn.Module,
    data: Tensor | Callable[[int, torch.Generator], Tensor],
    *,
    schedule: Any = None,
    prediction: str | Prediction | None = None,
    student_prediction: str | Prediction | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema: float = 0.999,
    max_norm: float = 1.0,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
    progress: bool | str = False,
) -> Distilled:
    """Train a student on what an ensemble predicts under its rule, so that one network does what K did.

    The loss is the mean squared difference of the noise that both find in noisy data, at times drawn evenly over the
    schedule (Hinton et al., arXiv 1503.02531, of regression). The ensemble is frozen: evaluated as it is, in planned
    passes, and no gradient reaches it. The student given is left as it is too; a copy of it is trained by AdamW with a
    learning rate that falls to zero, and its weights' moving average is returned. What is frozen in it stays as it is,
    as random features that are parameters do, unless all of it is.

    Args:
        ensemble: the teacher, an :class:`fastens.Ensemble` or any module that takes ``(x, t)``.
        student: a module with the members' signature, of any structure: a member (``ens.members[0]``), a merge of all
            (:func:`fastens.merge`), or a new network.
        data: clean samples [N, ...], or a function of a number and a generator that draws as many.
        schedule: that the members were trained under; none for the ensemble's own.
        prediction: what the members predict; none for what ensemble and scheduler say, else ``"epsilon"``.
        student_prediction: what the student predicts; none for the same.
        conditions: further arguments by name, [N, ...]: of each of the data's rows, as its class.
        steps: of the optimiser.
        batch_size: rows of a step.
        learning_rate: the highest.
        ema: decay of the moving average; less at the beginning.
        max_norm: the largest norm of a gradient.
        seed: of rows, times and noise.
        data_range: what the data must lie in.
        progress: show a progress bar, with this text in front of it.

    Raises:
        TypeError: data that is neither, a student that is no module or an ensemble.
        ValueError: data out of range; conditions without rows, or beside a function; no steps; no schedule.
    """
    if not isinstance(student, nn.Module) or isinstance(student, Ensemble):
        raise TypeError(
            f"distill: student is a {type(student).__name__}, expected one network, as ens.members[0]; "
            "fastens.training.training_step trains an ensemble"
        )
    if steps < 1 or batch_size < 1 or not 0 <= ema < 1:
        raise ValueError(
            f"distill: steps is {steps}, batch_size {batch_size} and ema {ema}, expected at least one step and row, "
            "and 0 <= ema < 1"
        )
    draw = _drawer(data, conditions or {}, data_range)
    teacher = Denoiser(ensemble, schedule, prediction)
    trained = in_mode(copy.deepcopy(student), True)
    if not any(p.requires_grad for p in trained.parameters()):  # as of a member of a frozen ensemble
        trained.requires_grad_(True)
    of_student = Denoiser(trained, teacher.schedule, student_prediction or teacher.prediction)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    average = torch.optim.swa_utils.AveragedModel(trained, avg_fn=_average(ema), use_buffers=True)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, recent = [], []
    with Progress("distillation", steps, "step", progress) as bar:
        for number in range(1, steps + 1):
            clean, given = draw(batch_size, generator)
            clean = clean.to(teacher.device)
            t = times_at(teacher.schedule, torch.rand(len(clean), dtype=torch.float64, generator=generator))
            noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
            alpha, sigma = teacher.schedule.coefficients(t, clean)
            teacher.conditioning = of_student.conditioning = {k: v.to(teacher.device) for k, v in given.items()}
            theirs, ours = score_matching(teacher, of_student, (alpha * clean + sigma * noise).to(clean.dtype), t)
            loss = (ours - theirs).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            falling.step()
            average.update_parameters(trained)
            recent.append(loss.detach())
            if number % 100 == 0 or number == steps:
                losses.append(float(torch.stack(recent).mean()))
                recent = []
            bar.update(1)
    return Distilled(evaluating(average.module), losses)


def _average(decay: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A moving average that forgets its beginning: of n weights the decay is at most ``(1 + n) / (10 + n)``."""

    def average(kept: Tensor, new: Tensor, number: Any) -> Tensor:
        if not (new.is_floating_point() or new.is_complex()):  # a counter, as of batch norms
            return new
        return torch.lerp(kept, new, 1 - min(decay, (1 + float(number)) / (10 + float(number))))

    return average


def _drawer(
    data: Any, conditions: Mapping[str, Tensor], data_range: tuple[float, float]
) -> Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """A function that draws rows and their conditions."""
    if callable(data) and not isinstance(data, Tensor):
        if conditions:
            raise ValueError(
                "distill: conditions are of the data's rows, and data is a function; wrap the networks in modules that "
                "draw their condition, or give data as a tensor"
            )
        make: Any = data
        return lambda number, generator: (make(number, generator), {})
    check_data("data", data, *data_range)
    for name, values in conditions.items():
        if not isinstance(values, Tensor) or values.shape[:1] != data.shape[:1]:
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"distill: condition {name!r} is {found}, expected a value for each of {len(data)} rows")

    def drawn(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(data), (number,), generator=generator)
        return data[rows.to(data.device)], {k: v[rows.to(v.device)] for k, v in conditions.items()}

    return drawn
