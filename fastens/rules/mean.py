"""The weighted arithmetic mean."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastens.rules.base import Rule

WEIGHT_SUM_TOLERANCE = 1e-6


def checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of a mean as floats, see :class:`Mean`."""
    try:
        values = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise TypeError(f"`weights`: expected a sequence of numbers, one per member, got {weights!r}") from None
    if not values:
        raise ValueError("`weights`: expected one weight per member, got none")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"`weights`: expected finite numbers, got {values}")
    total = math.fsum(values)
    if abs(total - 1.0) > WEIGHT_SUM_TOLERANCE:
        raise ValueError(
            f"`weights`: expected a sum of 1 within {WEIGHT_SUM_TOLERANCE}, got {total!r}; "
            "divide each weight by the sum"
        )
    return values


def weighted(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """``sum_k w_k S_k`` over dimension 0, in which a member of weight zero is not used."""
    at = [k for k, weight in enumerate(weights) if weight]
    used = scores if len(at) == len(scores) else scores[at]
    factors = torch.tensor([weights[k] for k in at], dtype=scores.dtype, device=scores.device)
    return (used * factors.view(-1, *[1] * (scores.dim() - 1))).sum(0)


def check_levels(rows: Sequence[Sequence[float]], levels: Sequence[float]) -> None:
    """Raise ValueError unless there is one row of weights, of one length, at each of rising noise levels."""
    if not rows or len(rows) != len(levels) or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"`weights`: expected one tuple of K weights per level, got {len(rows)} of "
            f"{sorted({len(row) for row in rows})} weights for {len(levels)} levels"
        )
    if not all(map(math.isfinite, levels)) or any(b <= a for a, b in itertools.pairwise(levels)):
        raise ValueError(f"`log_snr`: expected rising finite numbers, got {levels}")


def interpolated(rows: Sequence[Sequence[float]], levels: Sequence[float], level: float) -> tuple[float, ...]:
    """The weights at one noise level: linear between the levels, and the nearest one's beyond them."""
    right = min(max(bisect.bisect_right(levels, level), 1), len(levels) - 1)
    left = max(right - 1, 0)
    span = levels[right] - levels[left]
    share = min(max((level - levels[left]) / span, 0.0), 1.0) if span else 0.0
    return tuple(a + share * (b - a) for a, b in zip(rows[left], rows[right], strict=True))


@dataclasses.dataclass(frozen=True)
class Mean(Rule):
    """Weighted arithmetic mean, ``sum_k w_k S_k``; ``w_k = 1/K`` by default.

    A member of weight zero is not used: no infinity and no NaN of it reaches the mean, and no gradient reaches it.

    Args:
        weights: K finite numbers that sum to 1 within 1e-6; kept as a tuple of floats.

    Raises:
        TypeError: ``weights`` is not a sequence of numbers.
        ValueError: ``weights`` is empty, not finite, or does not sum to 1.
    """

    name: ClassVar[str] = "mean"
    has_kernels: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weights and keep them as a tuple, so that the value hashes."""
        if self.weights is None:
            return
        object.__setattr__(self, "weights", checked_weights(self.weights))

    def combine(self, scores: Tensor) -> Tensor:
        """The mean over dimension 0."""
        return scores.mean(0) if self.weights is None else weighted(scores, self.weights)

    def used(self, members: list[Tensor]) -> tuple[list[Tensor], Rule]:
        """The members of another weight than zero, and their mean."""
        if not self.linear or self.weights is None or all(self.weights):
            return members, self
        pairs = [(member, weight) for member, weight in zip(members, self.weights, strict=True) if weight]
        return [member for member, _ in pairs], Mean(tuple(weight for _, weight in pairs))

    @property
    def option(self) -> str:
        """None: the weights are numbers."""
        return ""

    @property
    def values(self) -> tuple[float, ...]:
        """The weights, empty for equal ones."""
        return self.weights or ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where there are weights but not one per member."""
        if self.weights is not None and len(self.weights) != num_members:
            raise ValueError(
                f"`weights`: expected one weight per member, {num_members}, got {len(self.weights)} weights; "
                "pass as many weights as members"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values."""
        return {"rule": self.name, "weights": None if self.weights is None else list(self.weights)}
