"""How rows are answered in deterministic mode, by plans or by torch: for ranks that have to agree on it."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastens.engine.calls import PlannedCall
    from fastens.engine.evaluator import FoldEngine
    from fastens.engine.planned import Plans


class Ways:
    """How the rows of a call were answered."""

    def __init__(self) -> None:
        self._plans: list[tuple[Plans, Any]] = []
        self.planned = True  # whether all were by plans

    def note(self, engine: FoldEngine, planned: PlannedCall | None, answered: bool) -> None:
        """Keep whether a plan answered."""
        self.planned = self.planned and answered
        if planned is not None and answered:
            self._plans.append((engine.plans, planned.key))

    def refuse(self) -> None:
        """Let the plans that answered do so no more."""
        for plans, key in self._plans:
            plans.refuse(key, "members on another rank have no plan")
            plans.ways_of_rows[key] = False


_ways: contextvars.ContextVar[Ways | None] = contextvars.ContextVar("ways", default=None)


@contextmanager
def ways_seen() -> Iterator[Ways]:
    """Look at how rows are answered."""
    ways = Ways()
    token = _ways.set(ways)
    try:
        yield ways
    finally:
        _ways.reset(token)


def note(engine: FoldEngine, planned: PlannedCall | None, answered: bool) -> None:
    """Say how a call of some rows, or of one, was answered."""
    ways = _ways.get()
    if ways is not None:
        ways.note(engine, planned, answered)
