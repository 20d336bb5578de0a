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
    """Whether plans answered the rows of a call, and which did: the ranks of a mesh have to agree on it."""

    def __init__(self) -> None:
        self._plans: list[tuple[Plans, Any]] = []
        self.planned = True  # whether all were by plans

    def note(self, engine: Engine, planned: PlannedCall | None, answered: bool) -> None:
        """Keep whether a plan answered."""
        self.planned = self.planned and answered
        if planned is not None and answered:
            self._plans.append((engine.plans, planned.key))

    def refuse(self) -> None:
        """Refuse the signatures whose plans answered, so that the call, made again, is answered by torch."""
        for plans, key in self._plans:
            plans.refuse(key, "members on another rank have no plan")
            plans.states.rows_by_plan[key] = False


_answers: contextvars.ContextVar[Answers | None] = contextvars.ContextVar("answers", default=None)


def answers_seen() -> AbstractContextManager[Answers]:
    """Scope that records what answers the rows of calls in it; gives the record, which is whole when the scope ends."""
    return scope(_answers, Answers())


def note(engine: Engine, planned: PlannedCall | None, answered: bool) -> None:
    """Record what answered a call of some rows, or of one, where :func:`answers_seen` asks for it."""
    answers = _answers.get()
    if answers is not None:
        answers.note(engine, planned, answered)
