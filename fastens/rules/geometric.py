"""The shifted geometric mean."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from fastens.rules.base import Rule, check_choice


@dataclasses.dataclass(frozen=True)
class Geometric(Rule):
    """Shifted geometric mean, ``exp(mean_k log(S_k + m)) - m`` with ``m = |min S| + eps``.

    Args:
        shift: the minimum is over the members and elements of one "sample", or over the whole "batch" as in the
            paper's code, where results depend on batch-mates.
        eps: added to the shift, so that every logarithm has a positive argument; at least 1e-30, to stay a normal
            number in float32.

    Raises:
        TypeError: ``eps`` is no number.
        ValueError: another value of ``shift``; ``eps`` not finite or too small.
    """

    name: ClassVar[str] = "geometric"
    has_kernels: ClassVar[bool] = True
    shift: str = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check ``shift`` and ``eps``."""
        check_choice("shift", self.shift, ("sample", "batch"))
        try:
            object.__setattr__(self, "eps", float(self.eps))
        except (TypeError, ValueError):
            raise TypeError(f"`eps`: expected a number, got {self.eps!r}") from None
        if not (math.isfinite(self.eps) and self.eps >= 1e-30):
            raise ValueError(f"`eps`: expected a finite number of at least 1e-30, got {self.eps!r}")

    @property
    def option(self) -> str:
        """``shift``."""
        return self.shift

    @property
    def values(self) -> tuple[float, ...]:
        """``eps``."""
        return (self.eps,)

    def combine(self, scores: Tensor) -> Tensor:
        """The geometric mean over dimension 0."""
        if scores.numel() == 0:
            return scores.sum(0)
        dims = [0, *range(2, scores.dim())] if self.shift == "sample" else None
        smallest = scores.amin(dims, keepdim=True) if dims else scores.min()  # [1, B, 1, ...] or []
        # For min <= 0, m = -min + eps. Adding m to S would lose eps to rounding, so the difference is taken first.
        shift = smallest.abs() - torch.where(smallest > 0, 0.0, smallest.abs())
        base = torch.where(smallest > 0, 0.0, smallest)
        mean = (((scores - base) + shift) + self.eps).log().mean(0).exp()
        return (mean - self.eps) + (base - shift).squeeze(0)
