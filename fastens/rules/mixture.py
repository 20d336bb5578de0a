"""One member drawn per sample and trajectory."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastens.rules.base import Rule


@dataclasses.dataclass(frozen=True)
class Mixture(Rule):
    """One member, drawn per sample for a whole trajectory."""

    name: ClassVar[str] = "mixture"
    per_trajectory: ClassVar[bool] = True
