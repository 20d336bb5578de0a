"""The mean whose weights depend on the noise level."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from fastens.rules.mean import Mean, check_levels, checked_weights, interpolated


@dataclasses.dataclass(frozen=True)
class NoiseDependentMean(Mean):
    """Weighted mean whose weights depend on the noise level, interpolated linearly in ``log(alpha^2 / sigma^2)``.

    It is a rule of an ensemble that has a schedule, by which the time among its arguments becomes a noise level; beyond
    the levels the nearest one's weights hold. Where a weight is zero the member is not used, as in :class:`Mean`.
    :func:`fastens.evaluation.fit_weights` makes it.

    Args:
        weights: of the members at each level, L tuples of K finite numbers that sum to 1 within 1e-6.
        log_snr: of the levels, L rising numbers.

    Raises:
        TypeError: not numbers.
        ValueError: no levels, other numbers of weights and levels, levels that do not rise, or weights as for a mean.
    """

    name: ClassVar[str] = "noise_dependent_mean"
    linear: ClassVar[bool] = True
    needs_noise_level: ClassVar[bool] = True
    weights: tuple[tuple[float, ...], ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]  # of a rule with weights of its own
    log_snr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check weights and levels and keep them as tuples, so that the value hashes."""
        rows = tuple(checked_weights(row) for row in self.weights)
        try:
            levels = tuple(float(level) for level in self.log_snr)
        except (TypeError, ValueError):
            raise TypeError(f"`log_snr`: expected one number per level, got {self.log_snr!r}") from None
        check_levels(rows, levels)
        object.__setattr__(self, "weights", rows)
        object.__setattr__(self, "log_snr", levels)

    def at(self, log_snr: float) -> Mean:
        """The mean at one noise level."""
        return Mean(interpolated(self.weights, self.log_snr, log_snr))

    def combine(self, scores: Tensor) -> Tensor:
        """Raise ValueError: the weights are not known before the noise level is."""
        raise ValueError(f"rule {self.name!r} needs the noise level; use fastens.Ensemble, or rule.at(log_snr)")

    @property
    def values(self) -> tuple[float, ...]:
        """None: the weights are not known before the noise level is."""
        return ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where there is not one weight per member."""
        Mean(self.weights[0]).check(num_members)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values."""
        return {"rule": self.name, "weights": [list(row) for row in self.weights], "log_snr": list(self.log_snr)}
