"""One member drawn per sample at every evaluation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastens.rules.base import Rule


@dataclasses.dataclass(frozen=True)
class Alternating(Rule):
    """One member, drawn per sample at every evaluation."""

    name: ClassVar[str] = "alternating"
    has_kernels: ClassVar[bool] = True
    per_evaluation: ClassVar[bool] = True
