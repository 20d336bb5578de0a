"""The score of largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from fastens.rules.base import Rule


@dataclasses.dataclass(frozen=True)
class Dominant(Rule):
    """Elementwise the signed ``S_k`` of largest ``|S_k|``; ties go to the lowest k.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "dominant"
    has_kernels: ClassVar[bool] = True

    def combine(self, scores: Tensor) -> Tensor:
        """The element of largest magnitude over dimension 0."""
        return scores.gather(0, scores.abs().argmax(0, keepdim=True))[0]
