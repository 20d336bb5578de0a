"""What looped members have each its own of, and one was handed out of: what others change in it is done to all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastens.network.in_place import Node, do, edits_of_all, has_changed, seen
from fastens.network.snapshots import can_change

BY_NUMBER: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # members that are modules, for dynamo


class HandOuts:
    """The values of looped members that were handed out, by the names of their attributes.

    Args:
        why: members have values of their own.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self._values: dict[str, HandedOut] = {}
        self._lock, self._running = threading.Lock(), 0  # calls of members in progress

    def __bool__(self) -> bool:
        return bool(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __reduce__(self) -> Any:
        """A copy is of members of which nothing is handed out."""
        return HandOuts, (self._why,)

    def add(self, name: str, members: Sequence[nn.Module]) -> None:
        """Take note that the first member's value of an attribute is handed out, where all have one that can change."""
        known = self._values.get(name)
        if known is not None and known.held_by(members):
            return
        values = [own_value(member, name) for member in members]
        if len({id(x) for x in values}) > 1 and all(isinstance(x, Tensor | nn.Module) or can_change(x) for x in values):
            self._values[name] = HandedOut(name, values, self._why)

    @contextmanager
    def running(self, members: Iterable[int]) -> Iterator[None]:
        """Scope of code of some members, which may change what was handed out of theirs."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                for each in self._values.values():
                    for k in members:
                        each.look(k)

    def follow(self, members: Sequence[nn.Module], anew: Callable[[str], bool] = lambda name: False) -> None:
        """Do to all members what others did to what was handed out of the first.

        Args:
            members: all of them.
            anew: whether an attribute was given another value since, by its name.
        """
        with self._lock:
            if self._running:
                return
            self._values = {name: x for name, x in self._values.items() if not anew(name) and x.held_by(members)}
            for each in self._values.values():
                each.follow()


class HandedOut:
    """The value that each member has for an attribute, of which the first member's was handed out.

    Args:
        name: of the attribute.
        values: of the members.
        why: members have values of their own.
    """

    def __init__(self, name: str, values: list[Any], why: str) -> None:
        self._name, self._values, self._why = name, values, why
        self._seen = self._look()

    def _look(self) -> list[Node]:
        return [seen(value, exactly=not k) for k, value in enumerate(self._values)]

    def look(self, k: int) -> None:
        """Take member k's value as it is now for what its own code made of it."""
        if has_changed(self._seen[k]):
            self._seen[k] = seen(self._values[k], exactly=not k)

    def held_by(self, members: Sequence[nn.Module]) -> bool:
        """Whether members have these values still."""
        return all(own_value(member, self._name) is x for member, x in zip(members, self._values, strict=True))

    def follow(self) -> None:
        """Do to all members' values what others did to the first member's.

        Raises:
            ValueError: that depends on what the first member has there, which others have not; it is undone.
        """
        first, *others = self._seen
        if not has_changed(first):
            return
        if not any(map(has_changed, others)):  # else it was code of theirs, which a checkpoint runs again
            do(edits_of_all(self._name, first, others, self._why))
        self._seen = self._look()


def own_value(member: nn.Module, name: str) -> Any:
    """A member's own value of an attribute, none where it has its class's."""
    own = vars(member)
    tables = (own, *(own[table] for table in ("_modules", "_parameters", "_buffers")))
    return next((table[name] for table in tables if name in table), None)
