"""The elementwise median."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fastens.rules.base import Rule, check_choice


@dataclasses.dataclass(frozen=True)
class Median(Rule):
    """Elementwise median.

    Args:
        even: for even K, "average" of the two middle values or the "lower" of them.

    Raises:
        ValueError: another value of ``even``.
    """

    name: ClassVar[str] = "median"
    has_kernels: ClassVar[bool] = True
    even: str = "average"

    def __post_init__(self) -> None:
        """Check ``even``."""
        check_choice("even", self.even, ("average", "lower"))

    @property
    def option(self) -> str:
        """``even``."""
        return self.even

    def combine(self, scores: Tensor) -> Tensor:
        """The median over dimension 0; NaN where a member is NaN."""
        num_members = len(scores)
        ordered = scores.sort(0).values
        lower, upper = ordered[(num_members - 1) // 2], ordered[num_members // 2]
        middle = lower if self.even == "lower" or num_members % 2 else 0.5 * lower + 0.5 * upper
        return torch.where(scores.isnan().any(0), torch.nan, middle)
