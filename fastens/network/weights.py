"""Whether the weights of a network are as they were: the same tensors, where they were, not written to."""

from __future__ import annotations

import ctypes
import itertools
import operator
from typing import Any

from torch import Tensor, nn

from fastens import _native

_VERSION = operator.attrgetter("_version")
_EPOCHS = itertools.count(step=1 << 32)  # those of one list of tensors are fewer


class Weights:
    """The tensors of a network, and their state.

    Args:
        tensors: all of them.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._watch: _Watch | None = None
        self._looked = False

    def state(self) -> Any:
        """What is another than before where a tensor was written to, as far as torch counts, or got other memory."""
        if not self._looked:  # not before it is asked for: members of other kinds of tensors never do
            self._watch, self._looked = _watch_of(self.tensors), True
        epoch = -1 if self._watch is None else self._watch.look()
        return _by_python(self.tensors) if epoch < 0 else epoch


def _by_python(tensors: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Versions, -1 for tensors that were made in inference mode and have none, and addresses."""
    try:
        versions = tuple(map(_VERSION, tensors))
    except RuntimeError:
        versions = tuple(-1 if t.is_inference() else t._version for t in tensors)
    return versions, tuple(map(Tensor.data_ptr, tensors))


class _Watched(ctypes.Structure):
    _fields_ = (
        ("object", ctypes.c_void_p),
        ("implementation", ctypes.c_void_p),
        ("address", ctypes.c_void_p),
        ("version", ctypes.c_int64),
    )


class _Watch(ctypes.Structure):
    """What ``csrc/cpu/watch.cpp`` looks at, and the number of the state that it found."""

    _fields_ = (
        ("tensors", ctypes.POINTER(_Watched)),
        ("count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("epoch", ctypes.c_int64),
    )

    def look(self) -> int:
        return self.function(self.address)


def _watch_of(tensors: list[Tensor]) -> _Watch | None:
    """The library's watch over tensors; none where it cannot be had, or sees another state than Python."""
    library = _native.functions()
    ordinary = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
    if library is None or not tensors or not ordinary or not library.fastens_watch_possible():
        return None
    versions, addresses = _by_python(tensors)
    implementations = [t._cdata for t in tensors]
    words = [(ctypes.c_int64 * (type(t).__basicsize__ // 8)).from_address(id(t)) for t in tensors]
    offset = list(words[0]).index(implementations[0])
    if any(held[offset] != own for held, own in zip(words, implementations, strict=True)):
        return None
    facts = zip(map(id, tensors), implementations, addresses, versions, strict=True)
    watch = _Watch((_Watched * len(tensors))(*facts), len(tensors), 8 * offset, epoch := next(_EPOCHS))
    watch.address = ctypes.addressof(watch)
    watch.function = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(("fastens_watch", library))
    return watch if watch.look() == epoch else None
