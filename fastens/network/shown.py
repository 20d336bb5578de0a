"""What the network of looped members shows of them: of what they wrote to themselves, the first one's."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from fastens.fold.stand_ins import tracing
from fastens.fold.tensor import TABLES, MemberTensor, modules_of
from fastens.network.alike import HOOK_TABLES, attributes_apart
from fastens.network.code import of_library
from fastens.network.containers import container_of, items_in, pairs_in
from fastens.network.contents import inside
from fastens.network.in_place import (
    SEQUENCES,
    Edit,
    Node,
    do,
    edits_of_all,
    has_changed,
    own_copy,
    put_back,
    reached_by,
    seen,
)
from fastens.network.looks import Looks, values_of
from fastens.network.own_states import NO_STATE, in_same_places, pairs_of, same_objects
from fastens.network.snapshots import can_change, held_tensors, is_atom, slots_of
from fastens.network.weights import Weights

_CONTAINERS = {list, collections.deque, dict, collections.OrderedDict, collections.defaultdict, set}
_GONE = object()
Places = dict[int, tuple[Any, Any]]  # of objects of the first member, by identity: each, and what shows it


class _AsItWas:
    """A member after a call, to tell whether a later one changed it."""

    def __init__(self, member: nn.Module) -> None:
        tables = [table for _, module in modules_of(member) for table in (vars(module), module._modules)]
        self._member, self._attributes = member, Looks([values_of(table) for table in tables])
        self._inside = inside(member)
        self._tensors = Weights([x for x in held_tensors(member) if not isinstance(x, MemberTensor)])
        self._state = self._tensors.state()

    def still_is(self, member: nn.Module) -> bool:
        """Whether it is this member, with all that it had; of a large array's values that cannot be told."""
        as_it_was = member is self._member and self._attributes.same() and self._inside.same()
        return as_it_was and self._tensors.state() == self._state


class Shown:
    """The values of a network that its members, each a copy, wrote to: as these were given them, and as it shows them.

    Whoever holds a list of the network has the first member's items in it between calls, so that whatever is done to
    it is seen, and is done to the lists of all members.

    Args:
        network: of all members.
        before: the same, of the network before it was given other values.
    """

    def __init__(self, network: nn.Module, before: Shown | None = None) -> None:
        self._network = network
        self._given = [
            (path, module, name, seen(value, tuple))  # but for tensors and modules, which are followed elsewhere
            for path, module in modules_of(network)
            for name, value in vars(module).items()
            if name not in TABLES and name not in HOOK_TABLES and can_change(value)
        ]
        # of attributes that show the first member's, by the identity of the module and the name: as given, and as shown
        self._before: dict[tuple[int, str], tuple[nn.Module, Any, Node | None]] = {}
        self._now: dict[tuple[int, str], tuple[str, Any, Node | None]] = {}
        self._first: _AsItWas | None = None  # when it was shown
        self._places: Places = {} if before is None else before._places  # of its objects, whether shown now or hidden

    def begin(self, first: nn.Module) -> None:
        """Note what shows each object of the first member, no code of which has run."""
        self._places = self._unchanged(dict(modules_of(first)), set())

    def __contains__(self, name: str) -> bool:
        """Whether an attribute of the network shows the first member's."""
        return (id(self._network), name) in self._before

    def show(self, first: nn.Module, given: nn.Module) -> bool:
        """Show what the first member wrote to itself; return whether anything may have changed in the network.

        Args:
            first: the member.
            given: the same as it was before code of its own ran.
        """
        if tracing() or peek_interpreter_stack() is not None:
            return False
        if self._first is not None and self._first.still_is(first):
            return False
        apart, paths = attributes_apart(first, given, NO_STATE), [path for path, _ in modules_of(self._network)]
        pairs = list(zip(paths, pairs_of(first, self._network), modules_of(given), strict=True))
        shown: list[tuple[str, nn.Module, str, Any]] = []
        for path, mine, module, was in [(p, m, n, w) for p, (m, n), (_, w) in pairs if m is not None]:
            names = {*apart(mine, was), *(name for owner, name in self._before if owner == id(module))}
            shown += [(path, module, n, x) for n, x in vars(mine).items() if n in names and _is_data(n, x)]
            gone = names & vars(module).keys() - vars(mine).keys()
            shown += [(path, module, n, _GONE) for n in gone if _is_data(n, vars(module)[n])]
        for _, module, name, _ in shown:  # before any is written to, which may be in several places
            held, key = vars(module).get(name, _GONE), (id(module), name)
            if key not in self._before:
                self._before[key] = module, held, seen(held, tuple) if can_change(held) else None
        places = _Places(
            self._places, self._unchanged({p: m for p, (m, _), _ in pairs}, {(id(m), n) for _, m, n, _ in shown})
        )
        for path, module, name, value in shown:
            now, node = value, None
            if value is _GONE:
                del vars(module)[name]
            else:
                vars(module)[name] = now = places.written(vars(module).get(name, _GONE), value)
                node = seen(now, bits=False) if can_change(now) else None
            self._now[id(module), name] = f"{path}.{name}" if path else name, now, node
        self._first, self._places = _AsItWas(first), places.now
        return bool(self._before)

    def _unchanged(self, own: Mapping[str, nn.Module | None], shown: set[tuple[int, str]]) -> Places:
        """The objects of the first member that are as they were given, which the network shows by its own."""
        found: Places = {}
        for path, module, name, _ in self._given:
            mine = own.get(path)
            if (id(module), name) not in shown and mine is not None and name in vars(mine) and name in vars(module):
                for one, other in in_same_places(vars(mine)[name], vars(module)[name], found):
                    found[id(one)] = one, other
        return found

    def own(self, member: nn.Module) -> dict[int, Any]:
        """What a member has of its own in the place of each object that is shown, by the identity of that."""
        found: dict[int, Any] = {}
        modules = dict(modules_of(member))
        for path, now, _ in self._now.values():
            parent, _, name = path.rpartition(".")
            if parent in modules and name in vars(modules[parent]):
                same_objects(now, vars(modules[parent])[name], found)
        return found

    def hide(self, written: Any = ()) -> None:
        """Let the network have what members were given; but for attributes that were given other values since.

        Args:
            written: identities of modules, and names of those.
        """
        for key, (module, held, node) in reversed(self._before.items()):  # what was seen first is as it was given
            name = key[1]
            if node is not None:
                put_back(node)
            if key in written or vars(module).get(name, _GONE) is not self._now[key][1]:
                continue
            if held is _GONE:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = held
        self._before, self._now, self._first = {}, {}, None

    def look(self) -> None:
        """Compare all of the first member when it is shown next, large arrays too."""
        self._first = None

    def follow(self, written: set[Any], members: list[nn.Module], given: list[nn.Module], why: str) -> None:
        """Do to the values of members what others did to the network's.

        Args:
            written: identities of modules, and names of their attributes, that were given other values since; those
                are taken out that have the object that they had.
            members: all of them.
            given: the same as they were before code of their own ran.
            why: members have values of their own.

        Raises:
            ValueError: it depends on what the network has there, which members have not; it is undone.
        """
        own, done, edits = [dict(modules_of(x)) for x in members], set[int](), list[Edit]()
        for key, (path, now, node) in self._now.items():
            parent, _, name = path.rpartition(".")
            if node is None or vars(self._before[key][0]).get(name) is not now:
                continue
            written.discard(key)  # as `past += [1]` sets what it has changed in place
            if has_changed(node):
                values = [vars(each[parent]).get(name) if parent in each else None for each in own]
                alike = all(type(x) is type(now) for x in values)  # else nothing can be done to them
                theirs = [seen(x, bits=False) for x in values] if alike else [None]
                edits += edits_of_all(path, node, theirs, why, done)
        do([*edits, *self._edits_of_given(written, members, given, why)])  # all, or with an error none

    def _edits_of_given(
        self, written: Any, members: list[nn.Module], given: list[nn.Module], why: str
    ) -> Iterator[Edit]:
        """What is to be done where values are as they were given, since the first member has not written to them."""
        changed = [
            (path, name, node)
            for path, module, name, node in self._given
            if (id(module), name) not in written
            and (id(module), name) not in self._before
            and vars(module).get(name) is node.value
            and has_changed(node)
        ]
        if not changed:
            return
        apart = [attributes_apart(*both, {"training"}) for both in zip(members, given, strict=True)]
        own, before = [dict(modules_of(x)) for x in members], [dict(modules_of(x)) for x in given]
        done = set[int]()
        for path, name, node in changed:
            pairs = [(mine.get(path), was[path]) for mine, was in zip(own, before, strict=True)]
            if any(m is not None and name in differ(m, was) for differ, (m, was) in zip(apart, pairs, strict=True)):
                values = [vars(x)[name] for pair in pairs for x in pair if x is not None and name in vars(x)]
                yield from edits_of_all(f"{path}.{name}" if path else name, node, list(map(seen, values)), why, done)


def _is_data(name: str, value: Any) -> bool:
    """Whether an attribute can be had as the content of another, and reaches no code of a member."""
    if name in HOOK_TABLES:
        return False
    return is_atom(value) or (can_change(value) and all(map(_takes_content, reached_by(value))))


def _takes_content(value: Any) -> bool:
    kind = type(value)
    if kind in _CONTAINERS or kind is Tensor or is_atom(value):
        return True
    apart = isinstance(value, Tensor | nn.Module) or container_of(kind) is not None or of_library(kind.__module__)
    return not apart and bool(kind.__dictoffset__) and not list(slots_of(kind))


class _Places:
    """What shows each object of the first member, which is one object as long as that is, wherever it is.

    Args:
        before: of objects when they were shown last.
        unchanged: of those that are as they were given.

    Attributes:
        now: of all of them.
    """

    def __init__(self, before: Places, unchanged: Places) -> None:
        others = {id(place) for _, place in unchanged.values()}  # such as one that was given to another attribute
        self.now, self._before = unchanged, {i: each for i, each in before.items() if id(each[1]) not in others}
        self._taken = others.union(id(place) for _, place in before.values())

    def written(self, held: Any, value: Any) -> Any:
        """What shows a value: where no other is shown by it, what is held there, if it is of the same class."""
        if is_atom(value) or isinstance(value, Tensor):
            return own_copy(value)
        if id(value) in self.now:
            return self.now[id(value)][1]
        known = self._before.get(id(value))
        place = known[1] if known is not None else None if id(held) in self._taken else held
        if type(place) is not type(value):
            place = _emptied(copy.copy(value)) if type(value) in _CONTAINERS else own_copy(value)
        self.now[id(value)] = value, place
        self._taken.add(id(place))
        self._fill(place, value)
        return place

    def _fill(self, place: Any, value: Any) -> None:
        if isinstance(value, SEQUENCES):
            old = items_in(place)
            fresh = [self.written(old[i] if i < len(old) else None, x) for i, x in enumerate(items_in(value))]
            place.clear()
            place.extend(fresh)
        elif isinstance(value, set):
            fresh = set(value)
            place.clear()
            place.update(fresh)
        else:
            table, new = (x if isinstance(x, dict) else vars(x) for x in (place, value))
            old = dict(pairs_in(table))
            fresh = {key: self.written(old.get(key), x) for key, x in pairs_in(new)}
            table.clear()
            table.update(fresh)


def _emptied(container: Any) -> Any:
    container.clear()
    return container
