"""Refusals of a pass: errors after which nothing that it gives is used, whatever the network's code makes of them.

A network may catch every error of a part of its code and go on. A refusal is none of the network's: members have no
such error, and take the other branch. So refusals are noted when they are made, and raised again at the pass's end.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fastens.scopes import scope

_NOTED: contextvars.ContextVar[list[Refusal] | None] = contextvars.ContextVar("refusals", default=None)


class Refusal(Exception):
    """An error of a pass, and none of the network's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        noted = _NOTED.get()
        if noted is not None:
            noted.append(self)


@contextmanager
def insisted() -> Iterator[None]:
    """Scope of a network's code in a pass.

    Raises:
        Refusal: the first that was made in it, where the code caught that.
    """
    with scope(_NOTED, []) as noted:
        yield
    if noted:
        raise noted[0]


def apart() -> AbstractContextManager[Any]:
    """Scope of an evaluation that a network's code may ask of another ensemble in a pass: its refusals are its own."""
    return scope(_NOTED, None)
