"""Changes in place: what a value was, and what is done to others for them to change as it did."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastens.fold.tensor import TABLES, MemberTensor, memory_of
from fastens.network.containers import items_in, pairs_in
from fastens.network.deep_copies import copied
from fastens.network.made import has_tensors
from fastens.network.member_tables import MemberTable
from fastens.network.snapshots import can_change, held_tensors, is_atom, same_bits

SEQUENCES = list | collections.deque
Edit = tuple[Callable[[Any], Any], Any]  # and the value to which it is done


def edits_of_all(
    name: str, first: Node, others: Sequence[Node | None], why: str, done: set[int] | None = None
) -> list[Edit]:
    """What is to be done to other values for them to change as others changed one, which is undone where it raises.

    Args:
        name: of the one, for messages.
        first: it, as it was.
        others: the others.
        why: there are others.
        done: identities of what was looked at already, to which this is added: one list may be in several places.

    Raises:
        ValueError: that cannot be told.
    """
    own = {id(each.value) for each in _nodes(first) if isinstance(each.value, Tensor)}
    try:
        return list(_edits(name, first, others, own, set() if done is None else done))
    except _Unclear as error:
        put_back(first)
        raise ValueError(
            f"{error} was changed in place, which reached the first member only, since {why} set it anew, as by "
            f"ens.{name} = ...; lists can be emptied and extended, and items and flags set"
        ) from None


def do(edits: list[Edit]) -> None:
    """Do to each value what is to be done to it."""
    for edit, value in edits:
        edit(value)


class _Unclear(Exception):
    """What a change would be in other members cannot be told; the path of what was changed."""


class Node(NamedTuple):
    """A value as it was: its class, what it consisted of, and what of that can change itself.

    Of a tensor, whose ``data`` is written to without being counted, the values: a copy, or the sum of their bits.
    """

    value: Any
    kind: type
    content: dict[Any, Any]
    parts: dict[Any, Node]
    bits: Tensor | int | None


def _content(value: Any) -> dict[Any, Any]:
    """What a value consists of, by position, key or name."""
    if isinstance(value, MemberTable | MemberTensor):  # parts of stacks, which are all members'
        return {}
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        place = value.data_ptr() if _has_bits(value) else None, value.dtype, value.shape
        return {"version": version, "trained": value.requires_grad, "place": place}
    if isinstance(value, np.ndarray):
        return {"values": value.tobytes()}
    if isinstance(value, SEQUENCES | tuple):
        return dict(enumerate(items_in(value)))
    if isinstance(value, dict):
        return dict(pairs_in(value))
    if isinstance(value, set | frozenset):
        return {item: item for item in items_in(value)}
    return dict(getattr(value, "__dict__", {}))


def _has_bits(tensor: Tensor) -> bool:
    if isinstance(tensor, MemberTensor) or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_quantized or is_lazy(tensor)) and memory_of(tensor) is not None


def _sum_of_bits(tensor: Tensor) -> int:
    x = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach().resolve_neg()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.view(whole).sum(dtype=torch.int64))


def seen(
    value: Any,
    reached: Any = Tensor | tuple | nn.Module,
    known: set[int] | None = None,
    exactly: bool = False,
    bits: bool = True,
) -> Node:
    """A value as it is, with what it reaches: what can change itself, and what is of these classes.

    Args:
        value: to be looked at.
        reached: the classes.
        known: identities of what is looked at already.
        exactly: whether values of tensors are kept, so that every other one is told from them.
        bits: whether values of tensors count that were written to without being counted.
    """
    content, known = _content(value), known or set()
    known.add(id(value))
    parts = {} if isinstance(value, Tensor | np.ndarray | set | frozenset) else content
    deeper = {k: x for k, x in parts.items() if not is_atom(x) and (isinstance(x, reached) or can_change(x))}
    below = {key: seen(x, reached, known, exactly, bits) for key, x in deeper.items() if id(x) not in known}
    values = None
    if bits and isinstance(value, Tensor) and _has_bits(value):
        values = value.detach().clone() if exactly else _sum_of_bits(value)
    return Node(value, type(value), content, below, values)


def reached_by(value: Any) -> Iterator[Any]:
    """A value, and what is inside of it."""
    for node in _nodes(seen(value, bits=False)):
        yield node.value
        if not isinstance(node.value, Tensor | np.ndarray):
            yield from node.content.values()


def _nodes(node: Node) -> list[Node]:
    return [node, *(below for part in node.parts.values() for below in _nodes(part))]


def _same(node: Node, now: dict[Any, Any]) -> bool:
    before = node.content
    if type(node.value) is not node.kind:
        return False
    if isinstance(node.value, Tensor | np.ndarray | set):
        return before == now
    return list(before) == list(now) and all(before[key] is now[key] for key in now)


def has_changed(node: Node) -> bool:
    """Whether a value, or what it reaches, is another than it was."""
    nodes = _nodes(node)
    return any(not _same(each, _content(each.value)) for each in nodes) or any(map(_has_other_bits, nodes))


def _has_other_bits(node: Node) -> bool:
    """Whether a tensor, which has its place and its version, has other values."""
    if node.bits is None:
        return False
    if isinstance(node.bits, Tensor):
        return not same_bits(node.value.detach(), node.bits)
    return _sum_of_bits(node.value) != node.bits


def own_copy(value: Any) -> Any:
    """A copy for another member of what can change in place, but for tensors and modules."""
    if not can_change(value):
        return value
    tensors = {id(each.value): each.value for each in _nodes(seen(value)) if isinstance(each.value, Tensor)}
    return copied(value, dict(tensors))


def _edits(path: str, node: Node, others: Sequence[Node | None], own: set[int], done: set[int]) -> Iterator[Edit]:
    """What is to be done to other members' values, each with the value, for them to change as one did.

    Args:
        path: of the one, for messages.
        node: it, as it was.
        others: the others.
        own: identities of tensors of the one.
        done: identities of what was done to others already.

    Raises:
        _Unclear: that cannot be told.
    """
    now = _content(node.value)
    if id(node.value) in done:
        return
    done.add(id(node.value))
    if _same(node, now):
        if _has_other_bits(node):
            raise _Unclear(path)
    else:
        _check_told(path, node, now, own)
        values = [each.value for each in others if each is not None]
        if len(values) < len(others):
            raise _Unclear(path)
        edit = _edit(path, node, now, values)
        for value in values:
            yield edit, value
    for key, part in node.parts.items():
        if key in now and now[key] is part.value:
            below = path if key in TABLES else f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"
            if isinstance(node.value, nn.Module) and key in TABLES:
                _check_weights(path, part)
            yield from _edits(
                below, part, [None if each is None else each.parts.get(key) for each in others], own, done
            )


def _check_told(path: str, node: Node, now: dict[Any, Any], own: set[int]) -> None:
    """Raise where a value is of another class, or holds by another name what is one's own, as pruning does."""
    if type(node.value) is not node.kind:
        raise _Unclear(path)
    if not isinstance(node.value, Tensor | np.ndarray):
        holder = nn.Module()
        before = {id(x) for x in node.content.values()}
        vars(holder)["new"] = [x for x in now.values() if id(x) not in before or id(x) in own]
        places = [(key, id(x)) for key, x in node.content.items()]
        moved = any(id(x) in own and (key, id(x)) not in places for key, x in now.items())
        if moved or any(id(x) in own for x in held_tensors(holder) if id(x) not in before):
            raise _Unclear(path)


def _check_weights(path: str, table: Node) -> None:
    """Raise where a module got weights, which may have been made of those of one member."""
    before = {id(x) for x in table.content.values()}
    new = (
        name
        for name, x in _content(table.value).items()
        if id(x) not in before and (isinstance(x, Tensor) or has_tensors(x))
    )
    if (name := next(new, None)) is not None:
        raise _Unclear(f"{path}.{name}")


def _edit(path: str, node: Node, now: dict[Any, Any], others: list[Any]) -> Callable[[Any], Any]:
    """A function that changes a value of another member in the way in which one was changed."""
    value, before = node.value, node.content
    if isinstance(value, Tensor) and (before["version"], before["place"]) == (now["version"], now["place"]):
        if _has_other_bits(node) or not all(isinstance(other, Tensor) and other.is_leaf for other in others):
            raise _Unclear(path)
        return lambda other: other.requires_grad_(now["trained"])
    if isinstance(value, SEQUENCES):
        old, new = list(before.values()), list(now.values())
        if not new:
            return lambda other: other.clear()
        if len(new) > len(old) and all(a is b for a, b in zip(old, new, strict=False)):
            return lambda other: other.extend(map(own_copy, new[len(old) :]))
        places = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a is not b]
        if any(len(x) != len(old) for x in (new, *others)) or any(new[i] is each for i in places for each in old):
            raise _Unclear(path)
        return lambda other: [other.__setitem__(i, own_copy(new[i])) for i in places]
    if isinstance(value, set):
        return lambda other: (other.difference_update(before.keys() - now), other.update(now.keys() - before))
    kept = [key for key in before if key in now]
    if isinstance(value, Tensor | np.ndarray) or kept != [key for key in now if key in before]:
        raise _Unclear(path)
    items = {key: x for key, x in now.items() if key not in before or before[key] is not x}

    def edit(other: Any) -> None:
        table = other if isinstance(other, dict) else vars(other)
        for key in before.keys() - now:
            table.pop(key, None)
        table.update({key: own_copy(x) for key, x in items.items()})

    return edit


def put_back(node: Node) -> None:
    """Let a value, and what it reached, have the class and the content that it had, but for tensors and arrays."""
    for each in _nodes(node):
        _put_back(each)


def _put_back(node: Node) -> None:
    value, before = node.value, node.content
    if isinstance(value, Tensor | np.ndarray | tuple | frozenset) or _same(node, _content(value)):
        return
    if type(value) is not node.kind:
        value.__class__ = node.kind
    table = value if isinstance(value, dict | set | SEQUENCES) else vars(value)
    table.clear()
    (table.extend if isinstance(table, SEQUENCES) else table.update)(
        before.values() if isinstance(table, SEQUENCES) else before
    )
