"""What a network's code reads beside attributes of its modules, and whether that is as it was.

Beginning with ``forward`` of every module, code is followed from name to name: into methods, functions, closures, and
objects that modules hold. What these names stand for outside of the network (globals, attributes of classes and of
Python's modules, context variables, variables of closures) and what is inside of containers and objects is kept, by
identity, and compared with later. Libraries are not followed: torch, the standard library, and what is installed, but
for the packages that the network's modules are of; nor is code beyond a thousand functions and objects. A network reads
a few dozen such values at most.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import itertools
import os
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Set
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.code import functions_of, globals_in, imports_in, names_in, of_library
from fastens.network.contents import items_of, looks_inside
from fastens.network.looks import Look, Looks, named, values_of
from fastens.network.snapshots import is_atom, slots_of

_BEGIN = frozenset({"forward", "__call__"})
_LISTS = frozenset({"vars", "__dict__", "asdict", "astuple", "fields", "getmembers"})
_NAMESPACES = types.ModuleType | type
_CODE = _NAMESPACES | types.FunctionType | types.BuiltinFunctionType
_EPOCHS = itertools.count(1)  # of all threads, so that what two of them find at once gets two
_UNSET = object()
_MOST = 1000  # functions, classes and objects that are followed: what leads to more is no network's code


class _Known:
    """What was found, and the number of this state.

    Args:
        looks: each gives values that are compared, as they are when it is called.
        absent: names that the code asks for in vain, each of them with what has no such names.
        epoch: the number.
    """

    def __init__(self, looks: list[Look], absent: list[tuple[Any, Set[str]]], epoch: int) -> None:
        self._looks, self._absent, self.epoch = Looks(looks), absent, epoch
        self._owners = [owner for owner, _ in absent]
        # where names go, too, another may come: not from modules of Python's and classes
        self._objects = [x for x in self._owners if not isinstance(x, types.MappingProxyType) and "__spec__" not in x]
        self._sizes: Any = None
        self._none_came()

    def holds(self) -> bool:
        """Whether everything is the same object that it was, and nothing is there that was not."""
        return self._looks.same() and self._none_came()

    def _none_came(self) -> bool:
        """Whether no name is there that was not: looked for where there are other names, and another last one."""
        sizes = [*map(len, self._owners), *map(next, map(reversed, self._objects), itertools.repeat(None))]
        if sizes != self._sizes:
            if not all(owner.keys().isdisjoint(names) for owner, names in self._absent):
                return False
            self._sizes = sizes
        return True


class Surroundings:
    """What the code of a network reads beside the attributes of its modules.

    Args:
        network: whose code it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._known = _Known([], [], 0)
        self._modules: list[_Attributes] = []
        self._names: frozenset[str] = _BEGIN
        self._looked: Any = None
        self.changed()

    def changed(self) -> None:
        """Look whether the code leads elsewhere when the state is asked for: attributes of modules have changed."""
        self._asked = object()

    def state(self) -> int:
        """A number that is another one where something is not as it was."""
        known, asked = self._known, self._asked  # other threads, in other contexts, may find other values meanwhile
        holds = known.holds()
        if not holds or (self._looked is not asked and not self._leads_to_the_same()):
            reader = _Reader(self._network)
            self._modules, self._names = reader.modules, frozenset(reader.names)
            self._known = known = _Known(reader.looks(), reader.absent(), known.epoch if holds else next(_EPOCHS))
        self._looked = asked
        return known.epoch

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


class _Owner(NamedTuple):
    """What has names: those of values that are compared, and those that the code asks for in vain."""

    names: Any
    watched: set[str]
    absent: set[str]


class _Reader:
    """Follows the code of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.names = set(_BEGIN)
        self._owners: dict[int, _Owner] = {}  # by identity
        self._looks: list[Look] = []
        self._seen: dict[int, Any] = {}  # by identity, and kept, so that no other gets it
        self._waiting: deque[Any] = deque()  # the nearest first
        self._named: list[Callable[[], None]] = []
        modules = [module for _, module in modules_of(network)]
        self._inside = {id(module) for module in modules}
        self._packages = {_package(base.__module__) for module in modules for base in type(module).__mro__}
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
                self._follow(self._waiting.popleft())

    def looks(self) -> list[Look]:
        """What gives the values that were found, as they are when it is called."""
        return [*self._looks, *(named(names, watched) for names, watched, _ in self._owners.values() if watched)]

    def absent(self) -> list[tuple[Any, Set[str]]]:
        """The names that were not found, each of them with what has none such."""
        return [(names, frozenset(absent)) for names, _, absent in self._owners.values() if absent]

    def _follow(self, value: Any) -> None:
        kind = type(value)  # what an object says of its class may be no more than that, or an error
        followed = id(value) in self._seen or id(value) in self._inside
        if followed or issubclass(kind, torch.Tensor) or (is_atom(value) and not issubclass(kind, _NAMESPACES)):
            return
        if len(self._seen) >= _MOST:
            return
        self._seen[id(value)] = value
        if kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            self._waiting += [value.__func__, value.__self__]
        elif issubclass(kind, functools.partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif kind is contextvars.ContextVar:
            self._watch(_content_of_variable, value)
        elif issubclass(kind, weakref.ref):
            self._waiting.append(value())
        elif issubclass(kind, types.ModuleType):
            if not self._of_library(vars(value).get("__name__")):
                self._named_in(vars(value), vars(value))
        elif issubclass(kind, type):
            self._class(value)
        elif issubclass(kind, nn.Module):  # of another network: all that its own code may read
            for _, module in modules_of(value):
                self._class(type(module))
                self._named_in(vars(module), vars(module), set(vars(module)) - set(TABLES), code=True)
                self._looks += [values_of(vars(module)[table]) for table in TABLES]
        else:
            self._object(value, kind)

    def _of_library(self, module: Any) -> bool:
        """Whether a Python module is of torch, the standard library, or installed and no package of the network's."""
        package = _package(module)
        return of_library(package) or (package not in self._packages and _installed(package))

    def _function(self, function: types.FunctionType) -> None:
        if function.__module__ == "os":  # under whatever name
            self.names.add(function.__name__)
        if self._of_library(function.__module__):
            return
        code, names = function.__code__, function.__globals__
        self.names |= names_in(code)
        self._named_in(names, names, globals_in(code))
        for level, name in imports_in(code):
            self._imported("." * level + name, names.get("__package__") or names.get("__name__"))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if variable != "__class__" and id(cell) not in self._seen:  # that one is of ``super()``
                self._seen[id(cell)] = cell
                self._watch(_content_of_cell, cell)
        self._waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if vars(function):
            self._named_in(vars(function), vars(function), code=True)
            self._waiting += vars(function).values()  # what it wraps, or chooses from

    def _imported(self, name: str, package: Any) -> None:
        """Follow what a function imports, and the packages that it is in."""
        try:
            parts = importlib.util.resolve_name(name, package).split(".")
        except ImportError:
            return
        if not self._of_library(parts[0]):
            self._named_in(sys.modules, sys.modules, {".".join(parts[: i + 1]) for i in range(len(parts))})

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if id(base) in self._owners or self._of_library(base.__module__):
                continue
            self._named_in(base, vars(base))
            for name, value in vars(base).items():  # methods that Python calls, though no code names them
                if name.startswith("__") and not (name == "__init__" and issubclass(base, nn.Module)):
                    self._waiting += functions_of(value)

    def _object(self, value: Any, kind: type) -> None:
        """A container by what is inside, any other object by what is named."""
        if kind in weakref.ProxyTypes:
            return
        if issubclass(kind, threading.local):  # what it has for this thread
            self._looks.append(lambda: itertools.chain.from_iterable(vars(value).items()))
            self._waiting += vars(value).values()
            return
        looks, items = items_of(value)
        self._looks += looks
        self._waiting += items
        attributes = vars(value) if kind.__dictoffset__ else {}
        if of_library(kind.__module__) and issubclass(kind, Collection):  # such as the environment, which keeps another
            self._looks.append(values_of(attributes))
            self._waiting += attributes.values()
        if not self._of_library(kind.__module__):
            self._class(kind)
            if kind.__dictoffset__:
                self._named_in(attributes, attributes, code=True)
                self._named.append(functools.partial(self._listed, attributes, []))
            for member in slots_of(kind):
                self._named.append(functools.partial(self._slot, member, value, set()))
        self._waiting += [attributes.get("__wrapped__"), attributes.get("_value_")]  # that one is of an enumeration

    def _listed(self, attributes: dict[str, Any], done: list[bool]) -> None:
        """Watch all that an object has, where the code may list it."""
        if not done and not self.names.isdisjoint(_LISTS):
            done.append(True)
            self._looks.append(values_of(attributes))
            self._waiting += attributes.values()

    def _slot(self, member: Any, owner: Any, done: set[str]) -> None:
        name = member.__name__
        if name in self.names - done:
            done.add(name)
            self._watch(functools.partial(_content_of_slot, member), owner)

    def _named_in(self, owner: Any, names: Any, wanted: Set[str] | None = None, code: bool = False) -> None:
        """Watch what an owner has under the names of the code, or under these; code too where that may be put there."""
        of_class = isinstance(owner, type)
        _, watched, absent = self._owners.setdefault(id(owner), _Owner(names, set(), set()))
        done: set[str] = set()

        def look() -> None:
            for name in (self.names if wanted is None else wanted) - done:
                done.add(name)
                if name.startswith("__") and name not in _BEGIN:
                    continue
                if name not in names:
                    absent.add(name)
                    continue
                value = names[name]
                if code or not (issubclass(type(value), _CODE) or (of_class and hasattr(type(value), "__get__"))):
                    watched.add(name)
                self._waiting += functions_of(value) or [value]

        look() if wanted is not None else self._named.append(look)

    def _attributes_of_module(self, attributes: dict[str, Any], followed: set[str]) -> None:
        """Follow what a module of the network holds; that it is another object is noticed elsewhere."""
        for name in (attributes.keys() & self.names) - followed:
            followed.add(name)
            value = attributes[name]
            self._waiting.append(value)
            module = type(value).__module__
            if self._of_library(module) and not of_library(module):  # an object of a package for settings, or the like
                self._looks += looks_inside([value])

    def _watch(self, look: Callable[[Any], tuple[Any, ...]], owner: Any) -> None:
        self._looks.append(functools.partial(look, owner))
        self._waiting += look(owner)


def _package(module: Any) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


def _installed(package: str) -> bool:
    path = getattr(sys.modules.get(package), "__file__", None)
    return isinstance(path, str) and not {"site-packages", "dist-packages"}.isdisjoint(path.split(os.sep))


def _content_of_cell(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # nothing
        return (_UNSET,)


def _content_of_variable(variable: contextvars.ContextVar[Any]) -> tuple[Any, ...]:
    try:
        return (variable.get(),)  # its default, too
    except LookupError:
        return (_UNSET,)


def _content_of_slot(member: Any, owner: Any) -> tuple[Any, ...]:
    try:
        return (member.__get__(owner),)
    except AttributeError:
        return (_UNSET,)
