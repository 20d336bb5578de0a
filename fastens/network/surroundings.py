"""What a network's code reads beside attributes of its modules, and whether that is as it was.

Beginning with ``forward`` of every module, code is followed from name to name: into methods, functions, closures, and
objects that modules hold. What these names stand for outside of the network (globals, attributes of classes and of
Python's modules, context variables, variables of closures) and what is inside of containers and objects is kept, by
identity, and compared with later. Libraries are not followed. A network reads a few dozen such values at most.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import operator
import os
import types
from collections.abc import Callable
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.code import functions_of, names_in
from fastens.network.contents import Look, Looks, items_of, of_library
from fastens.network.snapshots import is_atom, slots_in, slots_of

_BEGIN = frozenset({"forward", "__call__"})
_OPERATORS = {name for name in vars(operator) if name.startswith("__")} | {
    "__bool__", "__enter__", "__eq__", "__exit__", "__float__", "__get__", "__getattr__", "__getattribute__",
    "__hash__", "__int__", "__iter__", "__len__", "__missing__", "__next__", "__radd__", "__reversed__", "__rmul__",
    "__rsub__", "__rtruediv__", "__torch_function__",
}  # fmt: skip
_NAMESPACES = types.ModuleType | type
_CODE = _NAMESPACES | types.FunctionType | types.BuiltinFunctionType
_SLOT = object()
_EPOCHS = itertools.count(1)  # of all threads, so that what two of them find at once gets two


class Surroundings:
    """What the code of a network reads beside the attributes of its modules.

    Args:
        network: whose code it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._known = Looks([]), 0
        self._modules: list[_Attributes] = []
        self._names: frozenset[str] = _BEGIN
        self._looked: Any = None
        self.changed()

    def changed(self) -> None:
        """Look whether the code leads elsewhere when the state is asked for: attributes of modules have changed."""
        self._asked = object()

    def state(self) -> int:
        """A number that is another one where something is not as it was."""
        (known, epoch), asked = self._known, self._asked  # other threads, in other contexts, may find others meanwhile
        holds = known.same()
        if not holds or (self._looked is not asked and not self._leads_to_the_same()):
            reader = _Reader(self._network)
            self._modules, self._names = reader.modules, frozenset(reader.names)
            epoch = epoch if holds else next(_EPOCHS)
            self._known = Looks(reader.looks()), epoch
        self._looked = asked
        return epoch

    def names(self) -> frozenset[str]:
        """The names in the code that is followed."""
        self.state()
        return self._names

    def _leads_to_the_same(self) -> bool:
        """Whether all modules have what they had under the names that the code uses."""
        modules, before = modules_of(self._network), self._modules
        return len(modules) == len(before) and all(
            attributes.same(vars(module)) for (_, module), attributes in zip(modules, before, strict=True)
        )


class _Attributes:
    """What a module has, as it was when its code was followed."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes, self._names, self._values = attributes, tuple(attributes), tuple(attributes.values())

    def same(self, attributes: dict[str, Any]) -> bool:
        """Whether a module is this one, and leads where it led: whatever numbers it has, and in whatever mode it is."""
        if attributes is not self._attributes or tuple(attributes) != self._names:
            return False
        pairs = zip(attributes.values(), self._values, strict=True)
        return all(map(is_, attributes.values(), self._values)) or all(
            now is before or (is_atom(now) and is_atom(before)) for now, before in pairs
        )


class _Reader:
    """Follows the code of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.names = set(_BEGIN)
        self._owners: dict[int, tuple[Any, Any, set[str]]] = {}  # by identity: what has names, and which are watched
        self._looks: list[Look] = []
        self._seen: dict[int, Any] = {}  # by identity, and kept, so that no other gets it
        self._waiting: list[Any] = []
        self._named: list[Callable[[], None]] = []
        modules = [module for _, module in modules_of(network)]
        self._inside = {id(module) for module in modules}
        self.modules = [_Attributes(vars(module)) for module in modules]
        for module in modules:
            self._class(type(module))
            self._named.append(functools.partial(self._attributes_of_module, vars(module), set()))
        size = (0, 0)
        while size != (len(self.names), len(self._named)):  # more names reach more code
            size = len(self.names), len(self._named)
            for look in list(self._named):
                look()
            if self.names & {"environ", "getenv"}:
                self._waiting.append(vars(os.environ)["_data"])
            while self._waiting:
                self._follow(self._waiting.pop())

    def looks(self) -> list[Look]:
        """What gives the values that were found, as they are when it is called."""
        looks = list(self._looks)
        for owner, names, watched in self._owners.values():
            if watched:
                several = tuple(watched) * (1 + (len(watched) == 1))  # of one name alone there is no tuple
                looks.append(functools.partial((itemgetter if owner is names else attrgetter)(*several), owner))
        return looks

    def _follow(self, value: Any) -> None:
        followed = id(value) in self._seen or id(value) in self._inside
        if followed or isinstance(value, torch.Tensor) or (is_atom(value) and not isinstance(value, _NAMESPACES)):
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._waiting += [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, contextvars.ContextVar):
            self._watch(lambda var: (var.get(None),), value)
        elif isinstance(value, types.ModuleType):
            if not of_library(value.__name__):
                self._named_in(vars(value), vars(value))
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, nn.Module):  # of another network: all that its own code may read
            for _, module in modules_of(value):
                self._named_in(vars(module), vars(module), set(vars(module)) - set(TABLES))
        else:
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        if of_library(function.__module__ or ""):
            return
        names = names_in(function.__code__)
        self.names |= names
        self._named_in(function.__globals__, function.__globals__, names)
        for cell in function.__closure__ or ():
            self._watch(lambda cell: (cell.cell_contents,), cell)
        self._waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self._waiting.append(getattr(function, "__wrapped__", None))

    def _class(self, kind: type) -> None:
        if id(kind) in self._owners:
            return
        members = _members_of(kind)
        if members:
            self._named_in(kind, members)
            for name in members.keys() & _OPERATORS:  # which code calls without their names
                self._waiting += functions_of(members[name])

    def _object(self, value: Any) -> None:
        """A container by what is inside, any other object by what is named."""
        kind = type(value)
        looks, items = items_of(value)
        self._looks += looks
        self._waiting += items
        if not of_library(kind.__module__):
            self._class(kind)
            if kind.__dictoffset__:
                self._named_in(vars(value), vars(value))
            if slots := {member.__name__: _SLOT for member, _ in slots_in(value, slots_of(kind))}:
                self._named_in(value, slots)
        self._waiting.append(vars(value).get("__wrapped__") if kind.__dictoffset__ else None)

    def _named_in(self, owner: Any, names: Any, wanted: set[str] | frozenset[str] | None = None) -> None:
        """Watch what an owner has under the names of the code, or under these."""
        _, _, watched = self._owners.setdefault(id(owner), (owner, names, set()))
        done: set[str] = set()

        def look() -> None:
            for name in names.keys() & (self.names if wanted is None else wanted) - done:
                done.add(name)
                if name.startswith("__") and name not in _BEGIN:
                    continue
                value = getattr(owner, name, None) if names[name] is _SLOT else names[name]
                if not isinstance(value, _CODE) and (owner is names or not hasattr(type(value), "__get__")):
                    watched.add(name)
                self._waiting += functions_of(value) or [value]

        look() if wanted is not None else self._named.append(look)

    def _attributes_of_module(self, attributes: dict[str, Any], followed: set[str]) -> None:
        """Follow what a module of the network holds; that it is another object is noticed elsewhere."""
        for name in (attributes.keys() & self.names) - followed:
            followed.add(name)
            self._waiting.append(attributes[name])

    def _watch(self, look: Callable[[Any], tuple[Any, ...]], owner: Any) -> None:
        try:
            found = look(owner)
        except ValueError:  # an empty cell
            return
        if not isinstance(found[0], _CODE):
            self._looks.append(functools.partial(look, owner))
        self._waiting += found


def _members_of(kind: type) -> dict[str, Any]:
    """The attributes of a class and its bases, but of those of libraries."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not of_library(base.__module__):
            found.update(vars(base))
    return found
