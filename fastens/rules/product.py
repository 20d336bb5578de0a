"""The product of the members' densities, each to a power."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import Tensor

from fastens.rules.base import Rule
from fastens.rules.mean import check_levels, interpolated, weighted


@dataclasses.dataclass(frozen=True)
class Product(Rule):
    """The score of the product of densities ``prod_k p_k^{w_k}``: ``sum_k w_k s_k``, with weights of any sum and sign.

    A sum of scores is one of noises, but not of data or velocities: where the weights do not sum to 1, an ensemble
    whose members predict those converts, for which it needs ``prediction`` and ``schedule``. A member of weight zero
    is not used, NaN or not. At noise levels above zero this is not the score of the noised product; see
    :mod:`fastens.composition` for what corrects that.

    Args:
        weights: K finite numbers, of either sign, or L tuples of them where they depend on the noise level; none for 1
            each.
        log_snr: of the L levels, rising numbers, ``log(alpha^2 / sigma^2)``; weights are interpolated linearly between
            them, and beyond the ends the nearest level's hold. Such a rule is of an ensemble that has a schedule.

    Raises:
        TypeError: not numbers.
        ValueError: no weights, numbers that are not finite, other numbers of weights and levels, levels that fall.
    """

    name: ClassVar[str] = "product"
    weights: Any = None
    log_snr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check weights and levels and keep them as tuples, so that the value hashes."""
        try:
            levels = tuple(float(level) for level in self.log_snr)
            rows: Any = () if self.weights is None else self.weights if levels else (self.weights,)
            rows = tuple(tuple(float(weight) for weight in row) for row in rows)
        except (TypeError, ValueError):
            raise TypeError(
                f"`weights`: expected one number per member, or with log_snr= one tuple of them per level, got "
                f"{self.weights!r}"
            ) from None
        if any(not row or not all(map(math.isfinite, row)) for row in rows):
            raise ValueError(f"`weights`: expected finite numbers, one per member, got {self.weights!r}")
        if levels:
            check_levels(rows, levels)
        object.__setattr__(self, "weights", rows if levels else rows[0] if rows else None)
        object.__setattr__(self, "log_snr", levels)

    @property
    def needs_noise_level(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # of a property
        """Whether the weights depend on it."""
        return bool(self.log_snr)

    @property
    def of_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # of a property
        """Whether some weights do not sum to 1: a sum of 1 commutes with conversions."""
        rows = self.weights if self.log_snr else (self.weights,)
        return self.weights is None or any(abs(math.fsum(row) - 1) > 1e-6 for row in rows)

    def at(self, log_snr: float) -> Product:
        """The product at one noise level."""
        return Product(interpolated(self.weights, self.log_snr, log_snr)) if self.log_snr else self

    def combine(self, scores: Tensor) -> Tensor:
        """The weighted sum over dimension 0."""
        if self.log_snr:
            raise ValueError(f"rule {self.name!r} needs the noise level; use fastens.Ensemble, or rule.at(log_snr)")
        return scores.sum(0) if self.weights is None else weighted(scores, self.weights)

    def check(self, num_members: int) -> None:
        """Raise ValueError where there are weights but not one per member."""
        row = self.weights[0] if self.log_snr else self.weights
        if row is not None and len(row) != num_members:
            raise ValueError(
                f"`weights`: expected one weight per member, {num_members}, got {len(row)} weights; "
                "pass as many weights as members"
            )
