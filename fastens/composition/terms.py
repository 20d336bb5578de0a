"""What a composition adds to a prediction: guidance by a condition left out, or by a weaker network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastens.aggregation import weights_at
from fastens.ensemble import Ensemble
from fastens.rules import Product
from fastens.schedules import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One branch beside the main one: ``(scale - 1) (main - branch)`` is added to the main prediction.

    The factors sum to 1, so the sum is the same in every parameterisation.
    """

    scale: float | Sequence[float] = 1.0
    interval: tuple[float, float] | None = None
    log_snr: Sequence[float] = ()
    _rule: Product = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check scale, interval and levels."""
        levels = self.log_snr
        try:
            scales: Any = self.scale
            rule = Product([[float(s)] for s in scales], tuple(levels)) if levels else Product([float(scales)])
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{type(self).__name__}: scale is {self.scale!r} with log_snr={tuple(levels)}, expected a finite "
                f"number, or as many as rising levels: {error}"
            ) from None
        object.__setattr__(self, "_rule", rule)
        if self.interval is not None:
            bounds = tuple(self.interval)
            if len(bounds) != 2 or any(math.isnan(b) for b in bounds) or not 0 <= bounds[0] < bounds[1]:
                raise ValueError(
                    f"{type(self).__name__}: interval is {self.interval!r}, expected (low, high) with 0 <= low < high, "
                    "noise-to-signal ratios sigma / alpha"
                )

    @property
    def needs_noise_level(self) -> bool:
        """Whether its scale depends on the noise level."""
        return bool(self.log_snr) or self.interval is not None

    def factor(self, schedule: Schedule | None, t: Tensor | None) -> Tensor | float:
        """``scale - 1`` at times of the schedule, float64 shaped as the times; 0 outside the interval.

        Args:
            schedule: none where the scale does not depend on the noise level.
            t: [] or [B]; likewise.
        """
        if not self.needs_noise_level:
            return cast(float, self.scale) - 1.0
        assert schedule is not None
        assert t is not None
        level = schedule.log_snr(t)
        rule = self._rule
        factor = torch.full_like(level, rule.weights[0]) if not self.log_snr else None
        factor = weights_at(rule, level.reshape(-1))[0].view_as(level) if factor is None else factor
        if self.interval is not None:
            ratio = torch.exp(-level / 2)
            factor = torch.where((self.interval[0] <= ratio) & (ratio <= self.interval[1]), factor, 1.0)
        return factor - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Term):
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): ``uncond + scale (cond - uncond)``.

    Args:
        scale: 1 is the conditional prediction, more pushes away from the unconditional one; or L numbers, one for each
            level of ``log_snr``, between which it is interpolated linearly.
        interval: noise-to-signal ratios sigma / alpha, (low, high), outside of which the scale is 1 and nothing more is
            evaluated (Kynkaanniemi et al., arXiv 2404.07724; there sigma, as alpha is 1).
        log_snr: of the levels, rising numbers; needs a schedule, as does ``interval``.
        conditional: arguments of the members by name, for samplers that do not pass the condition themselves.
        unconditional: the arguments that stand for no condition, or for another one, by name: tensors [B, ...] or
            [1, ...], or numbers.

    Raises:
        TypeError: arguments that are no mapping; a scale that is no number.
        ValueError: no unconditional arguments; an interval or levels that do not rise.
    """

    conditional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unconditional: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments too."""
        super().__post_init__()
        for name in ("conditional", "unconditional"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(
                    f"Guided: {name} is a {type(getattr(self, name)).__name__}, expected arguments by name, as in "
                    f"{name}={{'class_labels': labels}}"
                )
        if not self.unconditional:
            raise ValueError(
                "Guided: unconditional is empty, expected the arguments that stand for no condition, as in "
                "unconditional={'class_labels': 10}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Autoguided(Term):
    """Guidance by a weaker network (Karras et al., arXiv 2406.02507): ``weak + scale (strong - weak)``.

    Args:
        scale: as for :class:`Guided`, with ``interval`` and ``log_snr``.
        weak: a module or an :class:`fastens.Ensemble` of any structure and width, called with the same arguments; what
            it does not say of its prediction is as for the strong one. It is folded and planned by itself.

    Raises:
        TypeError: no module.
        ValueError: a weak ensemble whose rule draws members.
    """

    weak: Any = None

    def __post_init__(self) -> None:
        """Make the weak network an ensemble."""
        super().__post_init__()
        if not isinstance(self.weak, nn.Module):
            raise TypeError(
                f"Autoguided: weak is a {type(self.weak).__name__}, expected a torch.nn.Module or a fastens.Ensemble"
            )
        weak = self.weak if isinstance(self.weak, Ensemble) else Ensemble([self.weak])
        object.__setattr__(self, "weak", weak)
        if weak.rule.random:
            raise ValueError(
                f"Autoguided: rule {weak.rule.name!r} of the weak ensemble draws members, for which it would need "
                "a trajectory of its own; take weak.with_rule('mean')"
            )
