"""Scopes of context variables: what holds inside a block, in the thread or task that entered it."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def scope(variable: contextvars.ContextVar[T | None] | contextvars.ContextVar[T], value: T) -> Iterator[T]:
    """Give a context variable a value inside the block, which gets that value; afterwards it is as it was before."""
    token: Any = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
