"""Deep copies of networks and their state, of what ``copy`` refuses or takes apart too."""

from __future__ import annotations

import copy
import threading
from typing import Any, TypeVar

from fastens.network.snapshots import thread_locals

T = TypeVar("T")


def copied(value: T, memo: dict[int, Any] | None = None) -> T:
    """Copy a network or its state, with what ``copy`` refuses or leaves apart.

    What is kept for each thread comes as this one has it, and a dictionary whose items are its attributes stays one.
    """
    memo = {} if memo is None else memo
    try:
        return _copied(value, dict(memo))
    except TypeError:
        found = thread_locals(value)
        if not found:
            raise
    for kept in found:
        memo[id(kept)] = own = threading.local()
        vars(own).update(copy.deepcopy(vars(kept), memo))
    return _copied(value, memo)


def _copied(value: T, memo: dict[int, Any]) -> T:
    made = copy.deepcopy(value, memo)
    for each in memo.get(id(memo), ()):  # what was copied, which ``copy`` keeps there
        if isinstance(each, dict) and getattr(each, "__dict__", None) is each:
            own = memo[id(each)]
            object.__setattr__(own, "__dict__", own)
    return made
