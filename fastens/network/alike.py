"""Whether members are alike: equal in everything but the values of their parameters and buffers."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastens.fold.attributes import attributes_of
from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.closures import content_of, writes_to_closure
from fastens.network.containers import items_in, pairs_in
from fastens.network.parametrized import is_weight
from fastens.network.snapshots import same_bits, slots_in, slots_of

# Where a checkpoint came from, which changes nothing that its network computes.
_PROVENANCE = {
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_diffusers_version",
    "_use_default_values",
    "_class_name",
}
HOOK_TABLES = {name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict)}
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_VALUES = (
    int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.Size, np.generic, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
_EMPTY = (dict, list, set)
_CLASS_NAMES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__qualname__"}


def first_difference(first: nn.Module, other: nn.Module) -> str | None:
    """Where two members differ in anything but the values of parameters and buffers: ``path: this against that``."""
    return _Comparison(first, other).difference()


def attributes_apart(first: nn.Module, other: nn.Module, skipped: set[str]) -> Callable[..., list[str]]:
    """A function of a module of one member and a module of another: the attributes in which they differ."""
    comparison, skipped = _Comparison(first, other), {*skipped, *TABLES}

    def apart(a: nn.Module, b: nn.Module) -> list[str]:
        mine, yours = vars(a), vars(b)
        return [
            name
            for name in {**mine, **yours}
            if name not in skipped
            and (name not in mine or name not in yours or comparison.same(mine[name], yours[name]) is not None)
        ]

    return apart


class _Comparison:
    """A walk over two members side by side."""

    def __init__(self, first: nn.Module, other: nn.Module) -> None:
        self._tensors = tensors_of(first), tensors_of(other)
        self._names = tuple({id(t): name for name, t in tensors.items()} for tensors in self._tensors)
        self._seen: set[tuple[int, int]] = set()
        self._classes_seen: set[tuple[int, int]] = set()
        self._kept: list[Any] = []  # what ids stand for
        self._first, self._other = first, other

    def difference(self) -> str | None:
        """Where the members differ first."""
        return self._modules(self._first, self._other) or self._of_tensors()

    def same(self, a: Any, b: Any) -> str | None:
        """Return where two of their values differ; none where they are alike."""
        self._seen.clear()
        return self._same(a, b, "")

    def _of_tensors(self) -> str | None:
        a, b = self._tensors
        for name in [*a, *b]:
            if name not in a or name not in b:
                return f"{name}: present in one and absent (or tied) in the other"
            if a[name].shape != b[name].shape:
                return f"{name}: shape {list(a[name].shape)} against {list(b[name].shape)}"
            if isinstance(a[name], nn.Parameter) != isinstance(b[name], nn.Parameter):
                return f"{name}: a parameter in one and a buffer in the other"
            mine, yours = attributes_of(a[name]), attributes_of(b[name])
            if (mine or yours) and (found := self._attributes(mine, yours, f"{name}.", set())) is not None:
                return found
        return None

    def _modules(self, first: nn.Module, other: nn.Module) -> str | None:
        ours, theirs = dict(modules_of(first)), dict(modules_of(other))
        for path in [*ours, *theirs]:
            if path not in ours or path not in theirs:
                return f"{path}: present in one and absent in the other"
        for path in ours:
            found = self._module(ours[path], theirs[path], path)
            if found is not None:
                return found
        return None

    def _module(self, a: nn.Module, b: nn.Module, path: str) -> str | None:
        found = self._classes(type(a), type(b), path or "the root")
        if found is not None:
            return found
        prefix = f"{path}." if path else ""
        for table in TABLES[:2]:
            mine, yours = a.__dict__[table], b.__dict__[table]
            if [(n, t is None) for n, t in mine.items()] != [(n, t is None) for n, t in yours.items()]:
                return f"{prefix}{table[1:]}: {list(mine)} against {list(yours)}"
        return self._attributes(vars(a), vars(b), prefix, {*TABLES})

    def _attributes(self, a: dict[str, Any], b: dict[str, Any], prefix: str, skipped: set[str]) -> str | None:
        for name in a if a.keys() == b.keys() else [*a, *b]:
            if name in skipped or name in _PROVENANCE:
                continue
            if name not in a or name not in b:
                return f"{prefix}{name}: present in one and absent in the other"
            mine, yours = a[name], b[name]
            if mine is yours:
                continue
            if isinstance(mine, dict) and isinstance(yours, dict) and "_hooks" in name:  # keyed by a running number
                mine, yours = list(mine.values()), list(yours.values())
            found = self._same(mine, yours, f"{prefix}{name}")
            if found is not None:
                return found
        return None

    def _same(self, a: Any, b: Any, path: str) -> str | None:
        """Return where two values differ, none where they are alike; what cannot be compared counts as different."""
        if a is b:
            return None
        if type(a) is not type(b) and not (isinstance(a, nn.Module) and isinstance(b, nn.Module)):
            return _differ(path, a, b)
        if type(a) in _EMPTY and not a and not b:
            return None
        if isinstance(a, _VALUES) and not isinstance(a, enum.Enum):
            zeros = isinstance(a, float | complex | np.inexact) and str(a) != str(b)  # of other signs
            return None if (a == b and not zeros) or (a != a and b != b) else _differ(path, a, b)
        if (id(a), id(b)) in self._seen:
            return None
        self._seen.add((id(a), id(b)))
        self._kept.append((a, b))
        if isinstance(a, nn.Module):
            return self._modules_elsewhere(a, b, path)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            names = [self._names[i].get(id(x)) for i, x in enumerate((a, b))]
            if names[0] is not None or names[1] is not None:
                return None if names[0] == names[1] else _differ(path, a, b)
            if a.layout is not b.layout or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                return _differ(path, a, b)
            return None if same_bits(a, b) else f"{path}: tensors of different values"
        if isinstance(a, enum.Enum):
            return _differ(path, a, b)
        if isinstance(a, np.ndarray):
            same = a.dtype == b.dtype and a.shape == b.shape and _equal_arrays(a, b)
            return None if same else f"{path}: arrays of different values"
        return self._container(a, b, path)

    def _container(self, a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict):
            pairs = [[(key, x) for key, x in pairs_in(each) if key not in _PROVENANCE] for each in (a, b)]
            found, keys = None, [[key for key, _ in each] for each in pairs]
            if keys[0] != keys[1]:
                return f"{path}: keys {keys[0]} against {keys[1]}"
            for (key, x), (_, y) in zip(*pairs, strict=True):
                found = self._same(x, y, f"{path}[{key!r}]")
                if found is not None:
                    return found
            if isinstance(a, collections.defaultdict):
                found = self._same(a.default_factory, b.default_factory, f"{path}.default_factory")
            return found or self._own_attributes(a, b, path)
        if isinstance(a, list | tuple | collections.deque):
            mine, yours = items_in(a), items_in(b)
            if len(mine) != len(yours) or getattr(a, "maxlen", None) != getattr(b, "maxlen", None):
                return _differ(path, a, b)
            found = (self._same(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(mine, yours, strict=True)))
            return next((each for each in found if each is not None), None) or self._own_attributes(a, b, path)
        if isinstance(a, set | frozenset):
            return None if {*items_in(a)} == {*items_in(b)} else _differ(path, a, b)
        if isinstance(a, types.FunctionType):
            return self._functions(a, b, path)
        if isinstance(a, types.MethodType):
            return self._same(a.__func__, b.__func__, path) or self._same(a.__self__, b.__self__, f"{path}.__self__")
        if isinstance(a, functools.partial):
            parts = ((a.func, b.func), (a.args, b.args), (a.keywords, b.keywords))
            return next((d for x, y in parts if (d := self._same(x, y, path)) is not None), None)
        if isinstance(a, type):
            return self._classes(a, b, path)
        if isinstance(a, weakref.ref):
            return self._same(a(), b(), path)
        if isinstance(a, property):
            if is_weight(a) and is_weight(b):  # of the module that is asked, whichever one the class was made for
                return None
            parts = ((a.fget, b.fget), (a.fset, b.fset), (a.fdel, b.fdel))
            return next((d for x, y in parts if (d := self._same(x, y, path)) is not None), None)
        if isinstance(a, staticmethod | classmethod):
            return self._same(a.__func__, b.__func__, path)
        if isinstance(a, types.CellType):
            return self._same(content_of(a), content_of(b), path)
        if isinstance(a, _LOCKS) or type(a) is object:
            return None
        if isinstance(a, RemovableHandle):  # by which of the hooks it removes, which are compared where they are kept
            return None if _place(a) == _place(b) else _differ(path, a, b)
        return self._objects(a, b, path)

    def _objects(self, a: Any, b: Any, path: str) -> str | None:
        """Objects by their attributes, or by their own equality where they have none to look at."""
        if isinstance(a, torch.Generator):
            return f"{path}: random generators cannot be compared"
        slots = list(slots_of(type(a)))
        if hasattr(a, "__dict__") or slots:
            mine, yours = (
                {**getattr(x, "__dict__", {}), **{m.__name__: held for m, held in slots_in(x, slots)}} for x in (a, b)
            )
            found = self._attributes(mine, yours, f"{path}.", set())
            if found is not None or mine or dataclasses.is_dataclass(a):
                return found or self._behind_attributes(a, b, path)
        if type(a).__eq__ is not object.__eq__:
            try:
                return None if bool(a == b) else _differ(path, a, b)
            except Exception as error:
                return f"{path}: {_shown(a)} cannot be compared ({error})"
        heap = type(a).__flags__ & (1 << 9)  # made by a class statement: no state but its attributes
        return None if heap and type(a).__module__ != "builtins" else f"{path}: {_shown(a)} cannot be compared"

    def _behind_attributes(self, a: Any, b: Any, path: str) -> str | None:
        """What an object keeps where Python does not see it, as far as it tells those who copy it."""
        try:
            states = [each.__reduce_ex__(2) for each in (a, b)]
        except Exception as error:
            return f"{path}: {_shown(a)} cannot be compared ({error})"
        kind = type(a)
        if kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__:
            return None  # its attributes
        first, second = ([list(x) if isinstance(x, Iterator) else x for x in state] for state in states)
        return self._same(first, second, path)

    def _own_attributes(self, a: Any, b: Any, path: str) -> str | None:
        return self._attributes(vars(a), vars(b), f"{path}.", set()) if hasattr(a, "__dict__") else None

    def _modules_elsewhere(self, a: nn.Module, b: nn.Module, path: str) -> str | None:
        """Modules that an attribute refers to: a part of the member, or one that is not registered."""
        found = self._module(a, b, path)
        if found is not None:
            return found
        for name, t in tensors_of(a).items():
            other = tensors_of(b).get(name)
            known = id(t) in self._names[0]
            if other is None or (not known and (t.shape != other.shape or not same_bits(t, other))):
                return f"{path}.{name}: a module that is not registered has other values"
        return None

    def _functions(self, a: types.FunctionType, b: types.FunctionType, path: str) -> str | None:
        if a.__code__ != b.__code__:
            return f"{path}: function {a.__qualname__} against {b.__qualname__}"
        if writes_to_closure(a):
            return f"{path}: {a.__qualname__} writes to its closure, which copies of a member would share"
        parts = (
            (a.__defaults__, b.__defaults__), (a.__kwdefaults__, b.__kwdefaults__),
            (a.__closure__, b.__closure__), (vars(a), vars(b)),
        )  # fmt: skip
        return next((d for x, y in parts if (d := self._same(x, y, path)) is not None), None)

    def _classes(self, a: type, b: type, path: str) -> str | None:
        """One class, or classes made anew for each instance by the same code, as parametrizations do."""
        if a is b or (id(a), id(b)) in self._classes_seen:
            return None
        different = f"{path}: {a.__qualname__} against {b.__qualname__}"
        if (a.__module__, a.__qualname__) != (b.__module__, b.__qualname__) or len(a.__bases__) != len(b.__bases__):
            return different
        self._classes_seen.add((id(a), id(b)))
        for x, y in zip(a.__bases__, b.__bases__, strict=True):
            if (found := self._classes(x, y, path)) is not None:
                return found
        mine, yours = ({n: v for n, v in vars(c).items() if n not in _CLASS_NAMES} for c in (a, b))
        return self._attributes(mine, yours, f"{path}: class {a.__qualname__}.", {"__slotnames__", "__firstlineno__"})


def _place(handle: RemovableHandle) -> list[bool]:
    return [key == handle.id for key in handle.hooks_dict_ref() or ()]


def _equal_arrays(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def _differ(path: str, a: Any, b: Any) -> str:
    return f"{path}: {_shown(a)} against {_shown(b)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
