"""Whether the weights of a network are as they were: the same tensors, where they were, not written to."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from fastens import _native
from fastens.fold.tensor import memory_of

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
        """What is another than before where a tensor was written to, as far as torch counts, or got other data."""
        if not self._looked:  # not before it is asked for: members of other kinds of tensors never do
            self._watch, self._looked = _watch_of(self.tensors), True
        epoch = -1 if self._watch is None else self._watch.look()
        return tuple(map(as_it_is, self.tensors)) if epoch < 0 else epoch


def as_it_is(tensor: Tensor) -> tuple[Any, ...]:
    """What changes where a tensor is written to, as far as torch counts, or is given other memory or another layout.

    A tensor that was made in inference mode counts no writes.
    """
    version = -1 if tensor.is_inference() else tensor._version
    strided = tensor.layout is torch.strided
    try:
        where = (tensor.data_ptr(), tensor.stride()) if strided else None  # others tell no address
    except RuntimeError:  # nor does what a transform of torch.func left in an attribute
        where = None
    return version, where, tensor.dtype, tensor.shape


class _Watched(ctypes.Structure):
    _fields_ = (
        ("object", ctypes.c_void_p),
        ("implementation", ctypes.c_void_p),
        ("address", ctypes.c_void_p),
        ("version", ctypes.c_int64),
        ("layout", ctypes.c_uint64),
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
    ordinary = all(type(t) in (Tensor, nn.Parameter) and memory_of(t) is not None for t in tensors)
    if library is None or not tensors or not ordinary or not library.fastens_watch_layouts_possible():
        return None
    seen = [(t.data_ptr(), as_it_is(t)[0]) for t in tensors]
    implementations = [t._cdata for t in tensors]
    words = [(ctypes.c_int64 * (type(t).__basicsize__ // 8)).from_address(id(t)) for t in tensors]
    offset = list(words[0]).index(implementations[0])
    if any(held[offset] != own for held, own in zip(words, implementations, strict=True)):
        return None
    facts = ((id(t), own, *facts) for t, own, facts in zip(tensors, implementations, seen, strict=True))
    watched = (_Watched * len(tensors))(*facts)
    watch = _Watch(watched, len(tensors), 8 * offset, next(_EPOCHS))
    watch.address = ctypes.addressof(watch)
    watch.function = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(("fastens_watch", library))
    told = watch.look() >= 0  # which finds the layouts
    return watch if told and [(each.address or 0, each.version) for each in watched] == seen else None
