"""The sum."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from fastens.rules.base import Rule


@dataclasses.dataclass(frozen=True)
class Sum(Rule):
    """Sum, ``sum_k S_k``: the score of a product of experts at t = 0.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "sum"
    has_kernels: ClassVar[bool] = True

    def combine(self, scores: Tensor) -> Tensor:
        """The sum over dimension 0."""
        return scores.sum(0)
