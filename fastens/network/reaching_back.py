"""What a copy of a member would share with it: objects that ``copy.deepcopy`` keeps as they are, and that reach a part.

These are functions, with what is in their closures, defaults and attributes; caches of functions; weak references;
classes that were made in a function; and objects that say themselves how they are copied.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.closures import content_of
from fastens.network.code import of_library
from fastens.network.containers import items_in
from fastens.network.snapshots import is_atom, slots_in, slots_of

_BOUND = (types.BuiltinFunctionType, types.MethodWrapperType)
_NO_ATOMS = (*_BOUND, type)  # but of what they reach
_FURTHEST = 6  # steps from what is kept: what is further is a program's, and no member's


class Back(NamedTuple):
    """What reaches a part of its member.

    Attributes:
        name: the attribute, by its path.
        how: by what.
    """

    name: str
    how: str


def reaches_back(member: nn.Module, skipped: Collection[str] = ()) -> Back | None:
    """An attribute by which a copy of a member would reach a module, a tensor or a hook of this one.

    Args:
        member: whose attributes are looked at.
        skipped: names of attributes that are not.

    Returns:
        None where a copy of the member is on its own.
    """
    modules = modules_of(member)
    search = _Search(modules, tensors_of(member).values())
    bound: list[tuple[str, Any]] = []
    for name, value, of_class in _attributes(modules, skipped):
        how = search.how(value, "by a class" if of_class else "")
        if how is not None:
            return Back(name, how)
        bound += [(name, each) for each in search.taken()]
    return next((Back(name, "by a method") for name, each in bound if search.is_copied(each)), None)


def _attributes(modules: Iterable[tuple[str, nn.Module]], skipped: Collection[str]) -> Iterator[tuple[str, Any, bool]]:
    """The attributes of modules, by path, and of their classes that were made in a function; which of both it is."""
    for path, module in modules:
        prefix = f"{path}." if path else ""
        owners: list[Any] = [kind for kind in type(module).__mro__ if "<locals>" in kind.__qualname__]
        for owner in (module, *owners):
            for name, value in (vars(owner) if isinstance(owner, type) else _state_of(owner)).items():
                if not (_is_plain(value) or name in TABLES or name in skipped):
                    yield prefix + name, value, owner is not module


def _is_plain(value: Any) -> bool:
    """Whether a value is all there is: most are, and tables of hooks without one."""
    return (is_atom(value) and not isinstance(value, _NO_ATOMS)) or (type(value) is OrderedDict and not value)


class _Search:
    """Looks for ways from values to a member's parts by what a copy keeps as it is.

    Args:
        modules: those of the member, by path.
        tensors: its parameters and buffers.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], tensors: Iterable[Tensor]) -> None:
        self._own = {id(module) for _, module in modules} | {id(tensor) for tensor in tensors}
        self._modules = {id(module) for _, module in modules}
        self._own |= {id(table) for _, m in modules for name, table in vars(m).items() if "_hooks" in name}
        self._seen: dict[tuple[int, bool], Any] = {}  # and kept, so that no other gets its identity
        self._bound: list[Any] = []

    def how(self, value: Any, how: str = "") -> str | None:
        """By what a value reaches a part, none where it does not; ``how`` it is kept, where it is."""
        waiting: list[tuple[Any, str, int]] = [(value, how, 0)]
        while waiting:
            value, how, depth = waiting.pop()
            if how and self._is_part(value):
                return how
            known = (id(value), True) in self._seen or (id(value), bool(how)) in self._seen
            if known or depth > _FURTHEST or _is_plain(value):
                continue
            self._seen[id(value), bool(how)] = value
            if id(value) in self._modules:  # which is looked at by itself
                continue
            if isinstance(value, _BOUND):
                self._bound.append(value.__self__)
            for kept, parts in _parts(value, how):
                waiting += [(part, kept, depth + bool(kept)) for part in parts]
        return None

    def taken(self) -> list[Any]:
        """What methods of built-in classes were met since, which a copy keeps, are bound to."""
        taken, self._bound = self._bound, []
        return taken

    def is_copied(self, value: Any) -> bool:
        """Whether a copy of the member has a copy of a value that was met."""
        return (id(value), False) in self._seen

    def _is_part(self, value: Any) -> bool:
        if isinstance(value, RemovableHandle):
            return id(value.hooks_dict_ref()) in self._own
        return id(value) in self._own


def _parts(value: Any, how: str) -> Iterator[tuple[str, Iterable[Any]]]:
    """What a value is made of, with how a copy of the value keeps it as it is; empty where it copies it."""
    kind = type(value)
    if kind is types.FunctionType:
        cells = [content_of(cell) for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        yield "by a closure", [*cells, *defaults, *vars(value).values()]
    elif kind is functools._lru_cache_wrapper:
        yield "by a cache", gc.get_referents(value)
    elif issubclass(kind, weakref.ref):
        yield "by a weak reference", [value()]
    elif issubclass(kind, weakref.WeakSet | weakref.WeakKeyDictionary):
        yield "by a weak reference", list(value)
    elif issubclass(kind, weakref.WeakValueDictionary):
        yield "by a weak reference", list(value.values())
    elif kind in _BOUND:
        yield "by a method", [value.__self__]
    elif issubclass(kind, type):
        yield "by a class", vars(value).values() if "<locals>" in value.__qualname__ else ()
    elif kind is types.MethodType:
        yield how, [value.__self__, value.__func__]
    elif kind is property:
        yield how, [value.fget, value.fset, value.fdel]
    elif kind in (staticmethod, classmethod):
        yield how, [value.__func__]
    elif not (issubclass(kind, Tensor | types.ModuleType | RemovableHandle) or kind in weakref.ProxyTypes):
        yield from _of_object(value, kind, how)


def _of_object(value: Any, kind: type, how: str) -> Iterator[tuple[str, Iterable[Any]]]:
    """The parts of a container or of another object."""
    if "<locals>" in kind.__qualname__:
        yield "by a class", [kind]
    yield how, items_in(value)
    if issubclass(kind, functools.partial):
        yield how, [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
        return
    own = kind.__module__.partition(".")[0] == "fastens"
    if own or (not how and of_library(kind.__module__) and not issubclass(kind, nn.Module)):  # which copy as they ought
        return
    if not issubclass(kind, nn.Module) and not of_library(kind.__module__) and hasattr(kind, "__deepcopy__"):
        how = how or "by an object that is copied in its own way"
    yield how, _state_of(value).values() if kind.__dictoffset__ else ()
    yield how, [held for _, held in slots_in(value, slots_of(kind))]


def _state_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that a copy of it is made of: recurrent layers, say, make some of theirs anew."""
    if type(value).__getstate__ is not object.__getstate__:
        try:
            state = value.__getstate__()
        except Exception:  # nor can it be copied
            state = None
        if isinstance(state, dict):
            return state
    return vars(value)
