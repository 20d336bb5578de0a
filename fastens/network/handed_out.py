"""Values that looped members wrote to themselves and that were handed out: what others change in one is done to all."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastens.network.deep_copies import copied
from fastens.network.snapshots import can_change, is_atom

_SEQUENCES = list | collections.deque


class HandedOut:
    """The value that each member has for an attribute, of which the first member's was handed out.

    Args:
        name: of the attribute.
        values: of the members.
    """

    def __init__(self, name: str, values: list[Any]) -> None:
        self._name, self.values = name, values
        self._seen = [_seen(value) for value in values]

    def look(self, k: int) -> None:
        """Take member k's value as it is now for what its own code made of it."""
        self._seen[k] = _seen(self.values[k])

    def follow(self) -> None:
        """Do to all members' values what others did to the first member's.

        Raises:
            ValueError: that depends on what the first member has there, which others have not; it is undone.
        """
        first, *others = self._seen
        if not _changed(first):
            return
        if not any(map(_changed, others)):  # else it was code of theirs, which a checkpoint runs again
            try:
                for edit, value in list(_edits(first, others)):
                    edit(value)
            except _Unclear:
                for node in _nodes(first):
                    _put_back(node)
                raise ValueError(
                    f"{self._name} was changed in place, which reached the first member only, since members wrote to "
                    f"it themselves, each its own: set it anew, as by ens.{self._name} = ...; lists can be emptied and "
                    "extended, and items set"
                ) from None
        self._seen = [_seen(value) for value in self.values]


class _Unclear(Exception):
    """What a change would be in other members cannot be told."""


class _Node(NamedTuple):
    """A value as it was: what it consisted of, and what of that can change itself."""

    value: Any
    content: dict[Any, Any]
    parts: dict[Any, _Node]


def _content(value: Any) -> dict[Any, Any]:
    """What a value consists of, by position, key or name."""
    if isinstance(value, Tensor):
        return {"version": None if value.is_inference() else value._version}
    if isinstance(value, np.ndarray):
        return {"values": value.tobytes()}
    if isinstance(value, _SEQUENCES | tuple):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, set | frozenset):
        return {item: item for item in value}
    return dict(getattr(value, "__dict__", {}))


def _seen(value: Any, above: frozenset[int] = frozenset()) -> _Node:
    content, above = _content(value), above | {id(value)}
    parts = {} if isinstance(value, Tensor | np.ndarray | set | frozenset) else content
    deeper = {key: x for key, x in parts.items() if not is_atom(x) and id(x) not in above}
    deeper = {key: x for key, x in deeper.items() if isinstance(x, Tensor | tuple) or can_change(x)}
    return _Node(value, content, {key: _seen(x, above) for key, x in deeper.items()})


def _nodes(node: _Node) -> list[_Node]:
    return [node, *(below for part in node.parts.values() for below in _nodes(part))]


def _same(node: _Node, now: dict[Any, Any]) -> bool:
    before = node.content
    if isinstance(node.value, Tensor | np.ndarray | set):
        return before == now
    return list(before) == list(now) and all(before[key] is now[key] for key in now)


def _changed(node: _Node) -> bool:
    return any(not _same(each, _content(each.value)) for each in _nodes(node))


def own_copy(value: Any) -> Any:
    """A copy for another member of what can change in place, but for tensors and modules."""
    if not can_change(value):
        return value
    tensors = {id(each.value): each.value for each in _nodes(_seen(value)) if isinstance(each.value, Tensor)}
    return copied(value, dict(tensors))


def _edits(node: _Node, others: Sequence[_Node | None]) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """What is to be done to other members' values, each with the value, for them to change as one did.

    Raises:
        _Unclear: that cannot be told.
    """
    now = _content(node.value)
    if not _same(node, now):
        values = [each.value for each in others if each is not None]
        if len(values) < len(others):
            raise _Unclear
        edit = _edit(node, now, values)
        for value in values:
            yield edit, value
    for key, part in node.parts.items():
        if key in now and now[key] is part.value:
            yield from _edits(part, [None if each is None else each.parts.get(key) for each in others])


def _edit(node: _Node, now: dict[Any, Any], others: list[Any]) -> Callable[[Any], Any]:
    """A function that changes a value of another member in the way in which one was changed."""
    value, before = node.value, node.content
    if isinstance(value, _SEQUENCES):
        old, new = list(before.values()), list(now.values())
        if not new:
            return lambda other: other.clear()
        if len(new) > len(old) and all(a is b for a, b in zip(old, new, strict=False)):
            return lambda other: other.extend(map(own_copy, new[len(old) :]))
        places = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a is not b]
        if any(len(x) != len(old) for x in (new, *others)) or any(new[i] is each for i in places for each in old):
            raise _Unclear
        return lambda other: [other.__setitem__(i, own_copy(new[i])) for i in places]
    if isinstance(value, set):
        return lambda other: (other.difference_update(before.keys() - now), other.update(now.keys() - before))
    kept = [key for key in before if key in now]
    if isinstance(value, Tensor | np.ndarray) or kept != [key for key in now if key in before]:
        raise _Unclear
    items = {key: x for key, x in now.items() if key not in before or before[key] is not x}

    def edit(other: Any) -> None:
        table = other if isinstance(other, dict) else vars(other)
        for key in before.keys() - now:
            table.pop(key, None)
        table.update({key: own_copy(x) for key, x in items.items()})

    return edit


def _put_back(node: _Node) -> None:
    value, before = node.value, node.content
    if isinstance(value, Tensor | np.ndarray | tuple | frozenset) or _same(node, _content(value)):
        return
    table = value if isinstance(value, dict | set | _SEQUENCES) else vars(value)
    table.clear()
    (table.extend if isinstance(table, _SEQUENCES) else table.update)(
        before.values() if isinstance(table, _SEQUENCES) else before
    )
