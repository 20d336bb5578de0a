"""What a result was computed from, as a digest: of values by what they are, of modules by all that they compute by."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections import deque
from collections.abc import Mapping
from numbers import Number
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastens.engine.arguments import PerMember
from fastens.ensemble import Ensemble
from fastens.internal import settings_of
from fastens.network.code import globals_in, of_library
from fastens.raw import raw

# Packages whose objects hold what a result does not depend on.
_CLOSED = {"fastens", "logging", "threading", "_thread", "weakref", "asyncio", "concurrent", "multiprocessing", "queue"}
_SPEED = ("engine", "backend", "max_fold")  # settings of an ensemble that do not change what it computes
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_VALUES = (Tensor, np.ndarray, Mapping, set, frozenset, list, tuple, deque)  # equal where they are two objects
_PLAIN = (type(None), Number, np.generic, str, bytes, bytearray, enum.Enum, PurePath, slice, range, re.Pattern)
_NAMED = (type, types.BuiltinFunctionType, types.ModuleType)


def fingerprint(**parts: Any) -> str:
    """A short digest of tensors, modules and other values: equal parts, equal digest.

    A module is its classes, weights, buffers and attributes; an ensemble besides its rule and settings. Attributes that
    calls change are among them: then nothing that was kept is found, and all is computed again.
    """
    digest = _Digest()
    digest.add(parts)
    return digest.hash.hexdigest()[:16]


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # objects are held, so that no other has the place of one
        self._around: list[int] = []  # the values that the present one is in

    def add(self, value: Any) -> None:
        """Add a value, and what is in it."""
        kind = type(value)
        self._write(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(value, (*_PLAIN, torch.dtype, torch.device)):
            self._write(repr(value))
        elif isinstance(value, _NAMED):
            self._write(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}")
        elif isinstance(value, _VALUES) or dataclasses.is_dataclass(value):
            if id(value) not in self._around:
                self._around.append(id(value))
                self._add_object(value)
                self._around.pop()
        elif id(value) in self._seen:
            self._write(f"as number {self._seen[id(value)][0]}")
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_object(value)

    def _write(self, text: str) -> None:
        self.hash.update(f"{len(text)}:{text}".encode())

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            whole = getattr(value, "full_tensor", None)  # of an ensemble over a mesh
            self._add_array(value if whole is None else whole())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._add_array(torch.from_numpy(value) if value.dtype.kind in "biuf" else value)
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, PerMember):
            self._add_array(value.stack)
        elif isinstance(value, Mapping):
            self._write(str(len(value)))
            for key in sorted(value, key=repr):
                self.add(key)
                self.add(value[key])
        elif isinstance(value, set | frozenset):
            self.add(sorted(value, key=repr))
        elif isinstance(value, list | tuple | deque | np.ndarray):
            self._write(str(len(value)))
            for each in value:
                self.add(each)
        elif isinstance(value, types.FunctionType):
            self.add([value.__qualname__, value.__defaults__, value.__kwdefaults__])
            self._add_code(value.__code__)
            self.add([cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()])
            self.add(_globals_of(value))
        elif isinstance(value, types.MethodType):
            self.add([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            self.add([value.func, value.args, value.keywords])
        elif dataclasses.is_dataclass(value):
            self.add({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif type(value).__module__.partition(".")[0] not in _CLOSED:
            slots = {n for kind in type(value).__mro__ for n in _names_of(kind.__dict__.get("__slots__", ()))}
            self.add({name: getattr(value, name, None) for name in slots} | dict(getattr(value, "__dict__", {})))

    def _add_code(self, code: types.CodeType) -> None:
        inside = [each for each in code.co_consts if isinstance(each, types.CodeType)]
        values = [each for each in code.co_consts if not isinstance(each, types.CodeType)]
        self.add([code.co_code, code.co_names, values, len(inside)])
        for each in inside:  # of functions that it makes
            self._add_code(each)

    def _add_array(self, array: Any) -> None:
        self._write(f"{array.dtype} {tuple(array.shape)}")
        array = raw(array).cpu().numpy() if isinstance(array, Tensor) else array
        self.hash.update(array.tobytes())

    def _add_module(self, module: nn.Module) -> None:
        held = module.state_dict(keep_vars=False)
        self.add(held)
        for path, part in module.named_modules():
            self._write(f"{path} {type(part).__module__}.{type(part).__qualname__}")
            self.add({name: x for name, x in part.named_buffers(recurse=False) if _is_missing(held, path, name)})
            own = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE}
            if type(part).__module__.startswith("fastens."):
                own = {name: value for name, value in own.items() if not name.startswith("_")}
            self.add(own)
            if isinstance(part, Ensemble):
                self.add({name: value for name, value in settings_of(part).items() if name not in _SPEED})
                self.add(part.rule)


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """What a function's code names in its module; of a library's functions the names alone say what they are."""
    if of_library(function.__module__):
        return {}
    named = globals_in(function.__code__) & function.__globals__.keys()
    found = {name: function.__globals__[name] for name in named}
    own = types.FunctionType | types.BuiltinFunctionType
    return {n: x.__qualname__ if isinstance(x, own) and of_library(x.__module__) else x for n, x in found.items()}


def _names_of(slots: Any) -> set[str]:
    return {slots} if isinstance(slots, str) else {name for name in slots if not name.startswith("__")}


def _is_missing(held: Mapping[str, Any], path: str, name: str) -> bool:
    """Whether a buffer is none of the state that is saved."""
    return (f"{path}.{name}" if path else name) not in held
