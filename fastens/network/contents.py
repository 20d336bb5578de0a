"""What is inside of the lists, dictionaries and objects that modules hold, and whether that is as it was."""

from __future__ import annotations

import array
import functools
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.alike import HOOK_TABLES
from fastens.network.code import of_library
from fastens.network.containers import LOOKS, container_of, items_in
from fastens.network.looks import Look, Looks, values_of
from fastens.network.snapshots import is_atom, slots_in, slots_of

_FIXED = tuple, frozenset
_ARRAYS = np.ndarray | array.array | bytearray
_LARGEST = 1 << 16  # bytes of an array that are compared in every call


class _Bytes:
    """What an array holds, as one object for as long as it does."""

    def __init__(self, value: Any) -> None:
        self._value, self._held = value, b""

    def __call__(self) -> tuple[bytes]:
        now = bytes(self._value) if isinstance(self._value, bytearray) else self._value.tobytes()
        if now != self._held:
            self._held = now
        return (self._held,)


def items_of(value: Any) -> tuple[list[Look], list[Any]]:
    """What a container consists of: looks at what can change, and what is there now."""
    container = container_of(type(value))
    contents = () if container is None else LOOKS[container]
    looks: list[Look] = [] if container in _FIXED else [functools.partial(content, value) for content in contents]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return [lambda: value.ravel().tolist()], value.ravel().tolist()
    if (
        isinstance(value, _ARRAYS)
        and (value if isinstance(value, np.ndarray) else memoryview(value)).nbytes <= _LARGEST
    ):
        looks.append(_Bytes(value))
    return looks, items_in(value)


def inside(network: nn.Module) -> Looks:
    """All that attributes of a network's modules reach in containers and in objects, but for tensors and modules."""
    skipped = {*TABLES, *HOOK_TABLES}
    return Looks(
        looks_inside([x for _, m in modules_of(network) for name, x in vars(m).items() if name not in skipped])
    )


def looks_inside(waiting: list[Any]) -> list[Look]:
    """Looks at all that values reach so; the list is used up."""
    looks: list[Look] = []
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        kind = type(value)  # what an object says of its class may be no more than that, or an error
        if is_atom(value) or issubclass(kind, Tensor | nn.Module) or id(value) in seen:
            continue
        seen[id(value)] = value
        found, items = items_of(value)
        looks += found
        waiting += items
        if not of_library(kind.__module__):
            if kind.__dictoffset__:
                looks.append(values_of(vars(value)))
                waiting += vars(value).values()
            slots = list(slots_of(kind))
            if slots:
                looks.append(functools.partial(_held_in, value, slots))
                waiting += _held_in(value, slots)
    return looks


def _held_in(value: Any, slots: list[Any]) -> list[Any]:
    return [held for _, held in slots_in(value, slots)]
