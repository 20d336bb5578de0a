"""Writing in place: to what differs between members, to what they share, and to what is the caller's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastens.fold.names import OPERATIONS
from fastens.fold.nested import leaves_of
from fastens.fold.tensor import MemberTensor, NotFoldable, memory_of
from fastens.trace.record import in_progress

if TYPE_CHECKING:
    from fastens.fold.dispatch import Fold


STACKS: weakref.WeakValueDictionary[int | None, Tensor] = weakref.WeakValueDictionary()  # that were read, by memory


class NeedsWrappers(NotFoldable):
    """A tensor that was the same for all members received member-valued numbers: it must be a wrapper from birth."""

    def __init__(self, written: Tensor) -> None:
        super().__init__("a tensor that is the same for all members receives member-valued numbers")
        self.written = written


class WritesInput(NotFoldable):
    """The network writes to an argument of the call, which is the caller's."""


def writes_to(func: Any, args: Any, kwargs: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "").partition(".")[0]  # of an operation without its overload
    if kwargs.get("inplace"):  # as torch.nn.functional names it
        return True
    if name in ("__get__", "requires_grad_"):
        return False
    if name == "__set__" and _sets_nothing(*args):
        return False
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name == "__set__"
    return in_place or (
        name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    )


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a function changes among its arguments: the first, ``out``, and what the schema of an operation names."""
    found = [args[0]] if args and writes_to(func, args, kwargs) else []
    found.append(kwargs.get("out"))
    for i, name in _changed_by(func) if isinstance(func, OPERATIONS) else ():
        found.append(args[i] if i < len(args) else kwargs.get(name))
    return [x for x in leaves_of(found) if isinstance(x, Tensor)]


@functools.cache
def _changed_by(operation: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that an operation changes in any of its forms."""
    whole = isinstance(operation, torch._ops.OpOverloadPacket)
    each = [getattr(operation, name) for name in operation.overloads()] if whole else [operation]
    return [
        (i, argument.name)
        for op in each
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
    ]


def _sets_nothing(target: Any, value: Any) -> bool:
    """Whether a tensor takes the data that it has, as where ``module.to(device)`` is there already."""
    return isinstance(target, MemberTensor) and isinstance(value, MemberTensor) and value.stack is target.stack


def of_call(fold: Fold, x: Tensor) -> bool:
    """Whether a common value is in the memory of a tensor of the call, or made of one while a pass is recorded."""
    recording = in_progress() if fold.recording else None
    return memory_of(x) in fold.input_storages if recording is None else recording.depends(x)


def check_written(fold: Fold, targets: Any) -> None:
    """Raise where a pass cannot write to something.

    Raises:
        NotFoldable: it is in the memory of the network's parameters, which are each member's own, or of a tensor of
            which a view had to be copied: that would not change with it.
    """
    for target in leaves_of(targets):
        value = target.stack if type(target) is MemberTensor else target
        if not isinstance(value, Tensor):
            continue
        memory = memory_of(value)
        if memory in fold.weights:
            raise NotFoldable("the network writes to its parameters")
        if memory is not None and fold.copies.of(memory):
            raise NotFoldable("the network writes to a tensor of which a view had to be copied")


class Copies:
    """What a pass had to copy where a member has a view: by the memory that the view would be of."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.UntypedStorage, list[weakref.ref[Tensor]]]] = {}

    def of(self, memory: int) -> list[Tensor]:
        """The copies of views of some memory that are still there."""
        found = [ref() for ref in self._held[memory][1]] if memory in self._held else []
        return [x for x in found if x is not None]

    def add(self, copy: Tensor, viewed: Tensor) -> None:
        """Remember that a tensor is a copy where a member has a view of another, or of what that one is a copy of."""
        memory = memory_of(viewed)
        if memory is None:
            return
        behind = [m for m in list(self._held) if any(memory_of(x) == memory for x in self.of(m))]
        for each in behind:
            self._held[each][1].append(weakref.ref(copy, functools.partial(self._forget, each)))
        # the memory is held as long as the copy is, as a view would: no other tensor gets its address
        held = self._held.setdefault(memory, (viewed.untyped_storage(), []))
        held[1].append(weakref.ref(copy, functools.partial(self._forget, memory)))

    def _forget(self, memory: int, _: Any) -> None:
        if memory in self._held and not self.of(memory):
            del self._held[memory]


def count_write(written: Any) -> None:
    """Count a write from outside a pass to a stack, which torch does not count where it is to its ``data``."""
    stack = STACKS.get(memory_of(written.stack)) if type(written) is MemberTensor else None
    if stack is not None and not stack.is_inference():
        torch.autograd.graph.increment_version(stack)


def promote(fold: Fold, target: Any, source: Any = None) -> None:
    """Let a common tensor become member-valued, so that member-valued numbers can be written to it.

    Args:
        fold: the pass.
        target: the tensor.
        source: what is written; a recording must see that the tensor depends on it.
    """
    if not isinstance(target, Tensor):
        return
    if type(target) is not MemberTensor:
        raise NeedsWrappers(target)
    value = target.stack
    memory = memory_of(value)
    if memory is None:
        raise NotFoldable("member-valued numbers are written to a common tensor inside a transform of torch.func")
    if memory in fold.input_storages:
        raise WritesInput("member-valued numbers are written to an argument of the call")
    wrappers = fold.sharing(memory)
    if any(w.stack.dtype != value.dtype for w in wrappers) or _is_shared(fold, value, wrappers):
        raise NotFoldable("a tensor that others share memory with receives member-valued numbers")
    size, count = fold.hidden.size, value.untyped_storage().nbytes() // value.element_size()
    origin = _origin(value, wrappers)
    enabled = torch.is_grad_enabled() or origin.requires_grad
    with torch.set_grad_enabled(enabled):  # the graph of what was there, whichever view of it is written to
        flat = origin.as_strided((count,), (1,), 0)
        if fold.recording and source is not None:
            whole = fold.stack(source).new_empty(size * count, dtype=value.dtype)
            whole.copy_(flat.repeat(size))
        else:
            whole = flat.repeat(size)
    bases = {id(origin): whole}
    for w in wrappers:  # all that see the memory see the members' from now on
        root = _root(w.stack)
        differentiable = enabled and (w.stack.requires_grad or not root.requires_grad)
        strides = (count, *w.stack.stride())
        with torch.set_grad_enabled(differentiable):
            seen = bases.setdefault(id(root), whole.detach())
            w.become(seen.as_strided((size, *w.stack.shape), strides, w.stack.storage_offset()), fold.hidden)


def _root(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _origin(value: Tensor, wrappers: list[MemberTensor]) -> Tensor:
    """The tensor that others in its memory are views of, to which the graph leads if one does.

    Raises:
        NotFoldable: several graphs lead to the memory.
    """
    roots = [_root(x) for x in (value, *(w.stack for w in wrappers))]
    graphs = list({id(x): x for x in roots if x.requires_grad}.values())
    if len(graphs) > 1:
        raise NotFoldable("a tensor that others share memory with, and gradients, receives member-valued numbers")
    return graphs[0] if graphs else roots[0]


def depending(fold: Fold, target: MemberTensor, sources: Any) -> Tensor:
    """What a recording writes to in place of a constant, which it must not change: memory that depends on the call."""
    value, recording = target.stack, in_progress()
    if recording is None or recording.depends(value):
        return value
    source = next((x for x in leaves_of(sources) if isinstance(x, Tensor) and recording.depends(x)), None)
    if source is None:
        return value
    if value._base is not None or _is_shared(fold, value, [target]):
        raise NotFoldable("a tensor that others share memory with is written to")
    made = source.new_empty(value.shape, dtype=value.dtype)
    made.copy_(value)
    target.become(made, None)
    fold.knows(target)
    return made


def _is_shared(fold: Fold, value: Tensor, wrappers: list[MemberTensor]) -> bool:
    """Whether another tensor sees the memory of one: beside wrappers, its storage's Python object, and a recording."""
    known = {id(w.stack) for w in wrappers} | ({id(value._base)} if value._base is not None else set())
    storage = value.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > len(known) + 1 + fold.recording
