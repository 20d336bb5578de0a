"""How rows are answered in deterministic mode, by plans or by torch: for ranks that have to agree on it."""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fastens.scopes import scope

if TYPE_CHECKING:
    from fastens.engine.calls import PlannedCall
    from fastens.engine.engine import Engine
    from fastens.engine.planned import Plans


class Answers:
    """How the rows of a call were answered."""

    def __init__(self) -> None:
        self._plans: list[tuple[Plans, Any]] = []
        self.planned = True  # whether all were by plans

    def note(self, engine: Engine, planned: PlannedCall | None, answered: bool) -> None:
        """Keep whether a plan answered."""
        self.planned = self.planned and answered
        if planned is not None and answered:
            self._plans.append((engine.plans, planned.key))

    def refuse(self) -> None:
        """Let the plans that answered do so no more."""
        for plans, key in self._plans:
            plans.refuse(key, "members on another rank have no plan")
            plans.states.rows_by_plan[key] = False


_answers: contextvars.ContextVar[Answers | None] = contextvars.ContextVar("answers", default=None)


def answers_seen() -> AbstractContextManager[Answers]:
    """Look at how rows are answered."""
    return scope(_answers, Answers())


def note(engine: Engine, planned: PlannedCall | None, answered: bool) -> None:
    """Say how a call of some rows, or of one, was answered."""
    answers = _answers.get()
    if answers is not None:
        answers.note(engine, planned, answered)
