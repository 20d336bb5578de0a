"""What attributes reach that code can change in place: saved, compared with later, and put back.

Everything by which members are told apart (:mod:`fastens.network.alike`) is state, so everything of it that can change
is here: containers of every kind, objects by their attributes and slots, arrays, tensors, random generators and the
cells of closures.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import pickle
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from fastens.fold.tensor import TABLES, MemberTensor, memory_of, modules_of
from fastens.network.code import of_library
from fastens.network.containers import items_in, pairs_in


class Kind(NamedTuple):
    """How one kind of object is saved, compared with what was saved, put back, and what it refers to."""

    save: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    put_back: Callable[[Any, Any], Any] | None  # none where it cannot change, and only refers to what can
    reached: Callable[[Any], Iterable[Any]] = lambda value: ()


class Snapshot(NamedTuple):
    """One object as it was."""

    value: Any
    saved: Any
    kind: Kind

    def restored(self) -> bool:
        """Put it back; return whether it had been changed."""
        if self.kind.same(self.value, self.saved):
            return False
        assert self.kind.put_back is not None
        self.kind.put_back(self.value, self.saved)
        return True


def snapshots_of(value: Any, seen: set[int]) -> list[Snapshot]:
    """Return a snapshot of every object that a value reaches and that can change in place.

    Args:
        value: where to begin.
        seen: identities of what is looked at elsewhere; what is found is added.
    """
    return [
        Snapshot(each, kind.save(each), kind)
        for each, kinds in _reached([value], seen)
        for kind in kinds
        if kind.put_back is not None
    ]


def member_values(network: nn.Module) -> list[MemberTensor]:
    """The tensors with a value per member that a network holds in its attributes."""
    return [each for each in _tensors_in(network, ()) if isinstance(each, MemberTensor)]


def held_tensors(network: nn.Module, skipped: tuple[str, ...] = ()) -> list[Tensor]:
    """The tensors that are the same for all members and that a network holds beside its parameters and buffers."""
    return [each for each in _tensors_in(network, (*TABLES, *skipped)) if not isinstance(each, MemberTensor)]


def thread_locals(value: Any) -> list[threading.local]:
    """What a network, or its state, keeps for each thread by itself; of its content this thread sees its own."""
    waiting = _attributes_in(value, ()) if isinstance(value, nn.Module) else [value]
    return [each for each, _ in _reached(waiting, set()) if type(each) is threading.local]


def exchange(network: nn.Module, others: dict[int, Any]) -> None:
    """Put others in the place of objects, by identity, wherever the attributes of a network hold them."""
    modules = {id(module) for _, module in modules_of(network)}

    def other(item: Any) -> Any:
        if type(item) is tuple:
            return tuple(map(other, item))
        return others.get(id(item), item)

    for _, module in modules_of(network):
        for name, value in vars(module).items():
            if name in TABLES or is_atom(value):
                continue
            for each, kinds in _reached([value], set(modules)):
                for kind in kinds:
                    if kind.put_back is None or kind is TENSOR:
                        continue
                    saved = kind.save(each)
                    now = type(saved)(map(other, saved)) if isinstance(saved, list | set) else saved
                    if not kind.same(each, now):
                        kind.put_back(each, now)
            vars(module)[name] = other(value)


def _tensors_in(network: nn.Module, skipped: tuple[str, ...]) -> list[Tensor]:
    """The tensors that the attributes of a network reach, whatever is between; but for some of them, by name."""
    seen = {id(module) for _, module in modules_of(network)}
    return [each for each, _ in _reached(_attributes_in(network, skipped), seen) if isinstance(each, Tensor)]


def _attributes_in(network: nn.Module, skipped: tuple[str, ...]) -> list[Any]:
    """The values of a network's attributes that may reach others, the last of them first."""
    values = [
        value
        for _, module in modules_of(network)
        for name, value in vars(module).items()
        if type(value) not in _ATOMS and name not in skipped and (type(value) not in _CONTAINERS or value)
    ]
    return values[::-1]


def _reached(waiting: list[Any], seen: set[int]) -> Iterator[tuple[Any, tuple[Kind, ...]]]:
    """What values reach, the last of them first; the list is used up."""
    while waiting:
        value = waiting.pop()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        kinds = _kinds_of(type(value))
        yield value, kinds
        for kind in kinds:
            waiting.extend(kind.reached(value))


def is_atom(value: Any) -> bool:
    """Whether a value neither changes in place nor refers to any that does."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value))


def can_change(value: Any) -> bool:
    """Whether a value that is no tensor, module or function can change in place."""
    apart = isinstance(value, Tensor | nn.Module | types.FunctionType) or type(value) in _ATOMS
    return not apart and any(kind.put_back is not None for kind in _kinds_of(type(value)))


_ATOMS = frozenset((
    int, float, complex, bool, str, bytes, type(None), range, type, torch.dtype, torch.device, torch.Size,
    torch.memory_format, types.BuiltinFunctionType, types.ModuleType,
))  # fmt: skip
_CONTAINERS = frozenset((dict, collections.OrderedDict, list, set, tuple))  # which reach nothing while they are empty
_KNOWN: weakref.WeakKeyDictionary[type, tuple[Kind, ...]] = weakref.WeakKeyDictionary()


def _kinds_of(kind: type) -> tuple[Kind, ...]:
    """What an object of a class is: a container or the like, and what has attributes and slots."""
    kinds = _KNOWN.get(kind)
    if kinds is None:
        kinds = _KNOWN[kind] = tuple(_find_kinds(kind))
    return kinds


def _find_kinds(kind: type) -> Iterable[Kind]:
    known = next((base for base in kind.__mro__ if base in _BUILT_IN), None)
    if known is not None:
        yield _BUILT_IN[known]
    if kind in _BUILT_IN or issubclass(kind, type | Tensor | enum.Enum):
        return
    if not of_library(kind.__module__) or issubclass(kind, nn.Module):
        if kind.__dictoffset__:
            yield _ATTRIBUTES
        members = list(slots_of(kind))
        if members:
            yield _slotted(members)


def _same_pairs(now: Iterable[tuple[Any, Any]], saved: list[tuple[Any, Any]]) -> bool:
    now = list(now)
    return len(now) == len(saved) and all(a is c and b is d for (a, b), (c, d) in zip(now, saved, strict=True))


def _mapping(kind: Any) -> Kind:
    """Dictionaries of a kind, by its own methods and not those of a subclass."""

    def put_back(value: Any, saved: list[tuple[Any, Any]]) -> None:
        kind.clear(value)
        for key, item in saved:
            kind.__setitem__(value, key, item)

    return Kind(
        pairs_in,
        lambda value, saved: _same_pairs(pairs_in(value), saved),
        put_back,
        lambda value: [x for pair in pairs_in(value) for x in pair],
    )


def _same_items(value: Any, saved: list[Any]) -> bool:
    now = items_in(value)
    return len(now) == len(saved) and all(map(is_, now, saved))


def _refill_deque(value: collections.deque[Any], saved: list[Any]) -> None:
    collections.deque.clear(value)
    collections.deque.extend(value, saved)


def _refill_set(value: set[Any], saved: set[Any]) -> None:
    set.clear(value)
    set.update(value, saved)


def _same_array(value: Any, saved: Any) -> bool:
    if value.dtype != saved.dtype or value.shape != saved.shape:
        return False
    same = all(map(is_, value.flat, saved.flat)) if value.dtype.hasobject else value.tobytes() == saved.tobytes()
    return bool(same)


def _refill_attributes(value: Any, saved: list[tuple[str, Any]]) -> None:
    vars(value).clear()
    vars(value).update(saved)


def slots_of(kind: type) -> Iterable[Any]:
    """The descriptors of a class's slots."""
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            private = name.startswith("__") and not name.endswith("__")
            member = vars(base).get(f"_{base.__name__.lstrip('_')}{name}" if private else name)
            if isinstance(member, types.MemberDescriptorType):
                yield member


def slots_in(value: Any, members: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The slots of these descriptors that are set in an object, with what they hold."""
    found = []
    for member in members:
        try:
            found.append((member, member.__get__(value)))
        except AttributeError:  # not set
            continue
    return found


def _slotted(members: list[Any]) -> Kind:
    """Objects by the slots of these descriptors."""

    def items(value: Any) -> list[tuple[Any, Any]]:
        return slots_in(value, members)

    def put_back(value: Any, saved: list[tuple[Any, Any]]) -> None:
        for member, _ in items(value):
            member.__delete__(value)
        for member, item in saved:
            member.__set__(value, item)

    return Kind(
        items,
        lambda value, saved: _same_pairs(items(value), saved),
        put_back,
        lambda value: [item for _, item in items(value)],
    )


def _cells(function: types.FunctionType) -> list[tuple[types.CellType, Any]]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append((cell, cell.cell_contents))
        except ValueError:  # empty
            continue
    return found


def _refill_cells(_: types.FunctionType, saved: list[tuple[types.CellType, Any]]) -> None:
    for cell, content in saved:
        cell.cell_contents = content


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values, NaN among them."""
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout and same_bits(a.to_dense(), b.to_dense())
    if a.dtype is b.dtype and a.is_floating_point() and a.element_size() == 1:  # of which torch compares none
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    if torch.equal(a, a):  # no NaN, and nothing is allocated for the answer
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _of_tensor(tensor: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Its memory, and the values of what is no parameter, since some kernels write without counting a version.

    None where it has no memory, and in a trace, which holds what is written in place.
    """
    if torch.compiler.is_compiling():
        return None
    tensor = tensor.stack if type(tensor) is MemberTensor else tensor
    if is_functorch_wrapped_tensor(tensor) or tensor.is_meta or memory_of(tensor) is None:
        return None
    return tensor.data, None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _same_tensor(tensor: Tensor, saved: tuple[Tensor, Tensor | None] | None) -> bool:
    tensor = tensor.stack if type(tensor) is MemberTensor else tensor
    if saved is None:
        return True
    data, values = saved
    return _same_place(tensor, data) and (values is None or same_bits(tensor, values))


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    strides = a.layout is not torch.strided or a.stride() == b.stride()
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and strides


def _put_back_tensor(tensor: Tensor, saved: tuple[Tensor, Tensor | None]) -> None:
    tensor = tensor.stack if type(tensor) is MemberTensor else tensor
    data, values = saved
    if not _same_place(tensor, data):
        tensor.data = data
    if values is not None and not same_bits(tensor, values):
        with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
            tensor.copy_(values)


def _pickled(state: Callable[[Any], Any], put_back: Callable[[Any, Any], Any]) -> Kind:
    """Objects that tell their state as a whole."""
    return Kind(
        lambda value: pickle.dumps(state(value)),
        lambda value, saved: pickle.dumps(state(value)) == saved,
        lambda value, saved: put_back(value, pickle.loads(saved)),
    )


def _referring(to: Callable[[Any], Iterable[Any]]) -> Kind:
    """Objects that do not change, and refer to others."""
    return Kind(to, lambda value, saved: True, None, to)


TENSOR = Kind(_of_tensor, _same_tensor, _put_back_tensor)
_ATTRIBUTES = Kind(
    lambda value: list(vars(value).items()),
    lambda value, saved: _same_pairs(vars(value).items(), saved),
    _refill_attributes,
    lambda value: list(vars(value).values()),
)
_RAW = Kind(
    lambda value: value[:],
    lambda value, saved: bytes(value) == bytes(saved),
    lambda value, saved: value.__setitem__(slice(None), saved),
)
_BUILT_IN: dict[type, Kind] = {
    list: Kind(list.copy, _same_items, lambda value, saved: list.__setitem__(value, slice(None), saved), items_in),
    dict: _mapping(dict),
    collections.OrderedDict: _mapping(collections.OrderedDict),
    set: Kind(set.copy, set.__eq__, _refill_set, items_in),
    collections.deque: Kind(items_in, _same_items, _refill_deque, items_in),
    threading.local: _ATTRIBUTES,  # of this thread
    bytearray: _RAW,
    array.array: _RAW,
    np.ndarray: Kind(
        lambda value: np.array(value, copy=True),
        _same_array,
        lambda value, saved: np.ndarray.__setitem__(value, ..., saved),
        lambda value: value.flat if value.dtype.hasobject else (),
    ),
    Tensor: TENSOR,
    random.Random: _pickled(random.Random.getstate, random.Random.setstate),
    np.random.Generator: _pickled(lambda v: v.bit_generator.state, lambda v, s: setattr(v.bit_generator, "state", s)),
    np.random.RandomState: _pickled(np.random.RandomState.get_state, np.random.RandomState.set_state),
    torch.Generator: Kind(
        torch.Generator.get_state,
        lambda value, saved: torch.equal(value.get_state(), saved),
        torch.Generator.set_state,
    ),
    types.FunctionType: Kind(
        _cells,
        lambda value, saved: all(cell.cell_contents is content for cell, content in saved),
        _refill_cells,
        lambda function: [content for _, content in _cells(function)],
    ),
    types.MethodType: _referring(lambda method: (method.__self__,)),
    functools.partial: _referring(lambda value: (value.func, *value.args, *value.keywords.values())),
    tuple: _referring(items_in),
    frozenset: _referring(items_in),
}
