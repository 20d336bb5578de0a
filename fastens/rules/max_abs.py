"""The largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from fastens.rules.base import Rule


@dataclasses.dataclass(frozen=True)
class MaxAbs(Rule):
    """Elementwise ``max_k |S_k|``: the sign is lost; kept for comparison with the paper.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "max_abs"
    has_kernels: ClassVar[bool] = True

    def combine(self, scores: Tensor) -> Tensor:
        """The largest magnitude over dimension 0."""
        return scores.abs().amax(0)
