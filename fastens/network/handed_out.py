"""What looped members have each its own of, and one was handed out of: what others change in it is done to all."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.alike import HOOK_TABLES, attributes_apart
from fastens.network.containers import items_in, pairs_in
from fastens.network.deep_copies import copied
from fastens.network.member_tables import MemberTable
from fastens.network.snapshots import can_change, is_atom

_SEQUENCES = list | collections.deque
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
        self._seen = [_seen(value) for value in values]

    def look(self, k: int) -> None:
        """Take member k's value as it is now for what its own code made of it."""
        self._seen[k] = _seen(self._values[k])

    def held_by(self, members: Sequence[nn.Module]) -> bool:
        """Whether members have these values still."""
        return all(own_value(member, self._name) is x for member, x in zip(members, self._values, strict=True))

    def follow(self) -> None:
        """Do to all members' values what others did to the first member's.

        Raises:
            ValueError: that depends on what the first member has there, which others have not; it is undone.
        """
        first, *others = self._seen
        if not _changed(first):
            return
        if not any(map(_changed, others)):  # else it was code of theirs, which a checkpoint runs again
            _do_to_all(self._name, first, others, self._why)
        self._seen = [_seen(value) for value in self._values]


class ValuesInside:
    """What the network of all members holds that can change in place, of which members write to their own.

    Args:
        network: of all members.
    """

    def __init__(self, network: nn.Module) -> None:
        self._seen = [
            (path, module, name, _seen(value, tuple))  # but for tensors and modules, which are followed elsewhere
            for path, module in modules_of(network)
            for name, value in vars(module).items()
            if name not in TABLES and name not in HOOK_TABLES and can_change(value)
        ]

    def follow(self, written: Any, members: list[nn.Module], given: list[nn.Module], why: str) -> None:
        """Do to the values of members that wrote to theirs what others did to the network's; and to what was given.

        Args:
            written: identities of modules, and names of their attributes, that were given other values since.
            members: all of them.
            given: the same as they were before code of their own ran.
            why: members have values of their own.

        Raises:
            ValueError: it depends on what the network has there, which members have not; it is undone.
        """
        changed = [
            (path, name, node)
            for path, module, name, node in self._seen
            if (id(module), name) not in written and vars(module).get(name) is node.value and _changed(node)
        ]
        if not changed:
            return
        apart = [attributes_apart(*both, {"training"}) for both in zip(members, given, strict=True)]
        own, before = [dict(modules_of(x)) for x in members], [dict(modules_of(x)) for x in given]
        for path, name, node in changed:
            pairs = [(mine.get(path), was[path]) for mine, was in zip(own, before, strict=True)]
            if any(m is not None and name in differ(m, was) for differ, (m, was) in zip(apart, pairs, strict=True)):
                values = [vars(x)[name] for pair in pairs for x in pair if x is not None and name in vars(x)]
                _do_to_all(f"{path}.{name}" if path else name, node, [_seen(value) for value in values], why)


def _do_to_all(name: str, first: _Node, others: Sequence[_Node], why: str) -> None:
    """Do to other values what others did to one; where that cannot be told, undo it and raise."""
    try:
        for edit, value in list(_edits(first, others)):
            edit(value)
    except _Unclear:
        for node in _nodes(first):
            _put_back(node)
        raise ValueError(
            f"{name} was changed in place, which reached the first member only, since {why} set it anew, as by "
            f"ens.{name} = ...; lists can be emptied and extended, and items and flags set"
        ) from None


def own_value(member: nn.Module, name: str) -> Any:
    """A member's own value of an attribute, none where it has its class's."""
    own = vars(member)
    tables = (own, *(own[table] for table in ("_modules", "_parameters", "_buffers")))
    return next((table[name] for table in tables if name in table), None)


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
        return {"version": None if value.is_inference() else value._version, "trained": value.requires_grad}
    if isinstance(value, np.ndarray):
        return {"values": value.tobytes()}
    if isinstance(value, _SEQUENCES | tuple):
        return dict(enumerate(items_in(value)))
    if isinstance(value, MemberTable):  # parts of stacks, which are all members'
        return {}
    if isinstance(value, dict):
        return dict(pairs_in(value))
    if isinstance(value, set | frozenset):
        return {item: item for item in items_in(value)}
    return dict(getattr(value, "__dict__", {}))


def _seen(value: Any, reached: Any = Tensor | tuple | nn.Module, known: set[int] | None = None) -> _Node:
    """A value as it is, with what it reaches: what can change itself, and what is of these classes."""
    content, known = _content(value), known or set()
    known.add(id(value))
    parts = {} if isinstance(value, Tensor | np.ndarray | set | frozenset) else content
    deeper = {k: x for k, x in parts.items() if not is_atom(x) and (isinstance(x, reached) or can_change(x))}
    return _Node(value, content, {key: _seen(x, reached, known) for key, x in deeper.items() if id(x) not in known})


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
    if isinstance(value, Tensor) and before["version"] == now["version"]:
        if not all(isinstance(other, Tensor) and other.is_leaf for other in others):
            raise _Unclear
        return lambda other: other.requires_grad_(now["trained"])
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
