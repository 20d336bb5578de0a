"""Scopes of context variables: what holds inside a block, in the thread or task that entered it."""

from __future__ import annotations

import contextvars
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@contextmanager
def scope(variable: contextvars.ContextVar[T | None] | contextvars.ContextVar[T], value: T) -> Iterator[T]:
    """Give a context variable a value inside the block, which gets that value; afterwards it is as it was before."""
    token: Any = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


class Blocks(Generic[T]):
    """What blocks of a user's code say of one thing each, in the thread or task that entered them.

    A task keeps what held where it was made, however long it lives. A generator may enter a block and be closed by
    another task, as asyncio does to those that are not read to their end: a context variable can be reset in its own
    context only, so what that block said is marked as gone.

    Args:
        name: of the blocks, in errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: contextvars.ContextVar[dict[Hashable, _Said[T]]] = contextvars.ContextVar(name, default={})  # noqa: B039

    def of(self, thing: Hashable) -> T | None:
        """What the innermost block says of a thing, none where there is no block."""
        said = self._said.get().get(thing)
        while said is not None and said.left:
            said = said.before
        return None if said is None else said.value

    @contextmanager
    def block(self, thing: Hashable, value: T) -> Iterator[None]:
        """Say something of a thing inside the block.

        Raises:
            RuntimeError: its end is reached in another thread or task, where it did not hold.
        """
        before = self._said.get()
        said = _Said(value, before.get(thing))
        token = self._said.set({**before, thing: said})
        ended = False
        try:
            yield
            ended = True
        finally:
            try:
                self._said.reset(token)
            except ValueError:  # it is of another context
                said.left = True
                if ended:
                    raise RuntimeError(
                        f"the block of {self._name} was entered in one thread or task, and ended in another, in which "
                        "it did not hold: a generator was resumed there; enter it anew wherever the ensemble is called"
                    ) from None


class _Said(Generic[T]):
    """What one block says, and the one around it."""

    def __init__(self, value: T, before: _Said[T] | None) -> None:
        self.value, self.before, self.left = value, before, False
