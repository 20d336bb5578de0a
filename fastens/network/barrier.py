"""A write barrier around the Python state of a network: what is written to modules and to their tables is counted."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.made import allow_in_passes
from fastens.network.tables import Stacks, tables_of

_WRITES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
_PLAIN = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Barrier:
    """Counts writes, each when it is done: who has seen the number has not seen less of the network.

    Attributes:
        writes: to attributes of modules, and to their tables of tensors and of submodules.
        repeats: writes to attributes that left them as they were.
        names: the attributes, each with the identity of its module; emptied by who has looked at them.
        hooks: to their tables of hooks.
        state: the modes of all modules, and a number that every other write changes. A compiled graph is of one state:
            dynamo compares strings by value, where it would take a number that has changed for one that varies.
    """

    def __init__(self) -> None:
        self.writes = self.repeats = 0
        self.names: set[tuple[int, str]] = set()
        self.hooks = 0
        self._bits: dict[int, int] = {}  # by the identity of a module, its bit in the modes
        self._modes = self._turns = 0
        self.state = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Barrier:
        return Barrier()

    @property
    def written(self) -> tuple[int, int]:
        """What every write changes: one that repeats a value takes back what members have in its place."""
        return self.writes, self.repeats

    def wrote(self) -> None:
        """Count a write to the state."""
        self.writes += 1
        self._tell()

    def turned(self, module: nn.Module) -> None:
        """Count a change of a module's mode."""
        self.writes += 1
        self._turns += 1
        bit = self._bits.get(id(module), 0)
        self._modes = self._modes | bit if module.training else self._modes & ~bit
        self._tell()

    def look(self, modules: list[nn.Module]) -> None:
        """List the modules of a network, and their modes, as they are now."""
        self._bits = {id(module): 1 << i for i, module in enumerate(modules)}
        self._modes = sum(self._bits[id(module)] for module in modules if module.training)
        self._tell()

    def _tell(self) -> None:
        self.state = f"{self.writes - self._turns} {self._modes:x}"

    def hooked(self) -> None:
        """Count a write to the hooks."""
        self.hooks += 1


class Counted(Protocol):
    """A table of a module that counts what is written to it."""

    written: Callable[[], None]
    allow: Callable[[dict[str, Any], tuple[Any, ...]], None]


class Watched:
    """Marks a module whose attributes cannot change unnoticed; see :func:`watch`."""

    __slots__ = ()
    watches = nn.Module  # the class of such modules; without annotation, which would hide those of that class


def _repeats(module: nn.Module, name: str, value: Any) -> bool:
    """Whether a write leaves the network as it is: samplers call ``eval()`` before every evaluation.

    So does ``self.table = self.table.to(x.device)``, where the table is there already: a tensor's own version tells of
    writes to it.
    """
    if type(value) not in _PLAIN and not isinstance(value, Tensor):
        return False
    if not _holds(module, name, value):
        return False
    kind = class_of(module)  # whose properties and whose own ``__setattr__`` may do more than keep the value
    return kind.__setattr__ is nn.Module.__setattr__ and not hasattr(kind, name)


def _holds(module: nn.Module, name: str, value: Any) -> bool:
    """Whether a module's attribute or its table of tensors has a value by a name."""
    state = module.__dict__
    if name in state:
        return state[name] is value
    tables = (state[each] for each in TABLES[:2] if type(state.get(each)) is Stacks)
    return any(table.holds(name, value) for table in tables)


def _written(module: nn.Module, name: str, repeats: bool = False) -> None:
    barrier = module.__dict__.get("_barrier")  # none while a copy is being made
    if barrier is not None:
        barrier.names.add((id(module), name))
        if repeats:
            barrier.repeats += 1
        elif name == "training":
            barrier.turned(module)
        else:
            barrier.wrote()


@functools.cache
def _watching(kind: type[type]) -> type:
    """A class of classes that leave attributes to the class that they watch, as ``type(self).calls += 1`` sets."""

    def owner(cls: Any, name: str) -> Any:
        return cls if name.startswith(("__", "_abc_")) else cls.watches

    def set_(cls: Any, name: str, value: Any) -> None:
        kind.__setattr__(owner(cls, name), name, value)

    def delete(cls: Any, name: str) -> None:
        kind.__delattr__(owner(cls, name), name)

    return type(kind.__name__, (kind,), {"__setattr__": set_, "__delattr__": delete})


@functools.cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that differs from a class in nothing but that it counts writes.

    The class is its first base, whatever that has for bases itself: only then are instances laid out alike.
    """

    def set_(self: Any, name: str, value: Any) -> None:
        repeats = _repeats(self, name, value)
        try:
            super(made, self).__setattr__(name, value)
        finally:
            _written(self, name, repeats)

    def delete(self: Any, name: str) -> None:
        try:
            super(made, self).__delattr__(name)
        finally:
            _written(self, name)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "watches": kind}
    methods = {"__setattr__": set_, "__delattr__": delete}
    made: Any = _watching(type(kind))(kind.__name__, (kind, Watched), {**names, **methods})
    return made


@functools.cache
def _counted(kind: type[dict[Any, Any]]) -> type[dict[Any, Any]]:
    """A dictionary that differs from one of a kind in nothing but that it counts writes; its copies do not."""

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.allow(self, args)
            try:
                return method(self, *args, **kwargs)
            finally:
                self.written()

        return functools.wraps(method)(write)

    methods = {name: counting(getattr(kind, name)) for name in _WRITES}
    methods["__deepcopy__"] = lambda self, memo: kind({n: copy.deepcopy(x, memo) for n, x in self.items()})
    methods["__reduce_ex__"] = lambda self, _: (kind, (list(self.items()),))
    ignored = {"written": staticmethod(lambda: None), "allow": staticmethod(lambda table, args: None)}
    return type(kind.__name__, (kind,), {**methods, **ignored})


def _count(module: nn.Module, name: str, written: Callable[[], None], allow: Callable[..., None] | None = None) -> None:
    """Let a table of a module count what is written to it, where that is allowed."""
    table: dict[str, Any] = module.__dict__[name]
    if type(table) in (dict, OrderedDict):
        table = module.__dict__[name] = _counted(type(table))(table)
    if counts(table):
        table.written = written
        if allow is not None:
            table.allow = allow


def counts(table: dict[Any, Any]) -> TypeGuard[Counted]:
    """Whether a table counts what is written to it."""
    return hasattr(table, "written")


def watch(network: nn.Module, barrier: Barrier) -> None:
    """Let every module of a network, and its tables, count writes.

    Python looks up ``__setattr__`` on the class, so a module whose writes are counted is of another class; it has to be
    the same object, since other modules, closures and lists refer to it. So its class is replaced.
    """
    for _, _, table in tables_of(network):
        table.barrier = barrier
    modules = [module for _, module in modules_of(network)]
    barrier.look(modules)
    for module in modules:
        module.__dict__["_barrier"] = barrier
        _count(module, "_modules", barrier.wrote, allow_in_passes)
        for name in HOOKS:
            if not module.__dict__[name]:  # the handles of hooks that there are refer to their table as it is
                _count(module, name, barrier.hooked)
        if not isinstance(module, Watched):
            module.__class__ = _watched(type(module))


def unwatched(module: nn.Module) -> nn.Module:
    """The same module, of the class that it had."""
    for _, each in modules_of(module):
        if type(each) is not class_of(each):
            each.__class__ = class_of(each)
        each.__dict__.pop("_barrier", None)
    return module


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has for its author."""
    return type(module).watches if isinstance(module, Watched) else type(module)
