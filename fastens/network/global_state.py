"""What a member's code can change outside of the member: attributes of its classes, globals, defaults of functions.

All members share it, so a network whose code does that is looped. What can change is read from the code once for each
class, and is nothing for nearly all of them.
"""

from __future__ import annotations

import dis
import random
import types
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch

from fastens.network.closures import IN_PLACE, content_of
from fastens.network.code import codes_in, functions_of
from fastens.network.snapshots import can_change, snapshots_of

_LIBRARIES = ("torch", "fastens", "builtins", "abc", "typing", "collections")
_ABSENT = object()
_OWN = types.FunctionType, types.CellType  # whose values are no items of a dictionary
_ALWAYS = random.Random, np.random.Generator, np.random.RandomState, torch.Generator, torch.Tensor


class Place:
    """A name that code may assign, or whose value it may change: of a class, of globals, of a function's own values.

    Args:
        owner: a class, the globals of a module, a function for its defaults, or a cell of its closure.
        name: there.
        said: the name in messages, where that is another.
    """

    def __init__(self, owner: Any, name: str, said: str = "") -> None:
        self._owner, self._name, self.name = owner, name, said or name
        self._names: Any = owner if isinstance(owner, dict) else {} if isinstance(owner, _OWN) else vars(owner)
        self.key = id(owner), name

    def get(self) -> Any:
        """Return what the name stands for now."""
        if isinstance(self._owner, _OWN):
            return getattr(self._owner, self._name, _ABSENT)
        return self._names.get(self._name, _ABSENT)

    def put(self, value: Any) -> None:
        """Put back what was there."""
        if isinstance(self._owner, dict):
            self._owner.pop(self._name, None) if value is _ABSENT else self._owner.__setitem__(self._name, value)
        elif value is _ABSENT:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, value)


class _Reach(NamedTuple):
    """What code can change outside of a member, and whether it may draw from Python's or NumPy's generators."""

    places: list[Place]
    draws: bool
    values: dict[str, type]  # attributes of classes that are no code, by name
    assigned: set[str]  # names in code that assigns attributes or changes values, where it is of no class itself


_REACH: weakref.WeakKeyDictionary[type | types.FunctionType, _Reach] = weakref.WeakKeyDictionary()


class GlobalState:
    """What the code of a network's modules can change outside of them, as it is.

    Args:
        code: classes of the modules, and functions that are attributes of theirs.
        seen: identities of what is looked at elsewhere.

    Attributes:
        draws: whether the code may draw from Python's or NumPy's generators.
    """

    def __init__(self, code: set[type | types.FunctionType], seen: set[int]) -> None:
        reaches = [_reach_of(each) for each in code]
        places = {place.key: place for reach in reaches for place in reach.places}
        for name in {name for reach in reaches for name in reach.assigned}:  # whose ``self`` is any of the modules
            found = (Place(reach.values[name], name) for reach in reaches if name in reach.values)
            places.update((place.key, place) for place in found)
        self.draws = any(reach.draws for reach in reaches)
        self._values = [(place, place.get()) for place in places.values()]
        self._held = [
            (place, held) for place, value in self._values if value is not _ABSENT for held in snapshots_of(value, seen)
        ]

    def put_back(self) -> set[str]:
        """Undo what happened to it; return the names of what had been changed."""
        changed = set()
        for place, value in self._values:
            if place.get() is not value:
                changed.add(place.name)
                place.put(value)
        changed.update(place.name for place, held in self._held if held.restored())
        return changed


def _reach_of(code: type | types.FunctionType) -> _Reach:
    reach = _REACH.get(code)
    if reach is None:
        reach = _REACH[code] = _read(code)
    return reach


def _read(code: type | types.FunctionType) -> _Reach:
    if isinstance(code, types.FunctionType):
        values: dict[str, type] = {}
        waiting = [code]
    else:
        bases = [base for base in code.__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]
        values = {name: base for base in reversed(bases) for name, x in vars(base).items() if not _is_code(x)}
        waiting = [f for base in bases for x in vars(base).values() for f in functions_of(x)]
    followed, places, draws, assigned = set(), [], False, set()
    while waiting:
        function = waiting.pop()
        if function in followed:
            continue
        followed.add(function)
        names, changes, stored = _reads(function.__code__)
        if changes and function is code:
            assigned = names
        globals_ = function.__globals__
        for name in names:
            owner = values.get(name)
            if owner is not None and (stored or _changes(changes, vars(owner)[name])):
                places.append(Place(owner, name))
            value = globals_.get(name, _ABSENT)
            draws = draws or _is_generator(value)
            if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
                waiting.append(value)
            elif value is not _ABSENT and _changes(changes, value):
                places.append(Place(globals_, name))
        places += [Place(globals_, name) for name in _assigned_globals(function.__code__)]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if changes or any(issubclass(type(x), _ALWAYS) for x in defaults):
            places += [Place(function, name) for name in ("__defaults__", "__kwdefaults__") if getattr(function, name)]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        places += [Place(x, "cell_contents", name) for name, x in cells if _changes(changes, content_of(x))]
    return _Reach(places, draws, values, assigned)


def _changes(in_place: bool, value: Any) -> bool:
    """Whether code can change a value.

    Of a generator any call draws, whatever else the code may do in place, and a tensor is written to in too many ways.
    """
    return issubclass(type(value), _ALWAYS) or (in_place and can_change(value))


def _is_generator(value: Any) -> bool:
    """Whether a global is Python's or NumPy's random numbers, or a function of theirs."""
    if issubclass(type(value), types.ModuleType):
        return value in (random, np, np.random)
    bound = hasattr(type(value), "__self__")  # other objects may raise what they like when they are asked
    return bound and isinstance(value.__self__, random.Random | np.random.RandomState)


def _is_code(value: Any) -> bool:
    return isinstance(value, types.FunctionType | property | staticmethod | classmethod | type)


def _reads(code: types.CodeType) -> tuple[set[str], bool, bool]:
    """The names that code uses, whether it may change a value in place, and whether it assigns attributes."""
    names = {name for each in codes_in(code) for name in each.co_names}
    steps = {step for each in codes_in(code) for step in each.co_code[::2]}
    stored = dis.opmap["STORE_ATTR"] in steps
    written = any(name.endswith("_") and not name.endswith("__") for name in names)  # by torch's functions in place
    return names, stored or written or dis.opmap["STORE_SUBSCR"] in steps or bool(IN_PLACE & names), stored


def _assigned_globals(code: types.CodeType) -> set[str]:
    stores = dis.opmap["STORE_GLOBAL"]
    return {
        step.argval
        for each in codes_in(code)
        if stores in each.co_code[::2]
        for step in dis.get_instructions(each)
        if step.opname == "STORE_GLOBAL"
    }
