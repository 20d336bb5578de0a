"""Where a module of the folded network keeps its tensors: stacks to who lists them, one member's to its own code."""

from __future__ import annotations

import contextvars
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastens.fold.held import member_values
from fastens.fold.stand_ins import standing_in, traced, tracing
from fastens.fold.tensor import MemberTensor, all_members, memory_of, modules_of
from fastens.fold.writes import STACKS

_SEEN: contextvars.ContextVar[Callable[[Tensor], Tensor] | None] = contextvars.ContextVar("seen", default=None)


@contextmanager
def seen_as(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let networks and members read other values than the stacks hold, made when they are read; none is written."""
    token = _SEEN.set(change)
    try:
        yield
    finally:
        _SEEN.reset(token)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, a parameter as one; common tensors of a pass in progress are no wrappers."""
    if tensor.dtype == dtype:
        return tensor
    with torch._C.DisableTorchFunction():
        other = tensor.to(dtype)
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


def as_seen(tensor: Tensor) -> Tensor:
    """What a network reads in the place of a stack."""
    change = _SEEN.get()
    return tensor if change is None else change(tensor)


_READ: contextvars.ContextVar[Callable[[Tensor], Tensor] | None] = contextvars.ContextVar("read", default=None)


@contextmanager
def read_through(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let members' own modules get what a function makes of their part of a stack."""
    token = _READ.set(change)
    try:
        yield
    finally:
        _READ.reset(token)


_ALONE: contextvars.ContextVar[int | None] = contextvars.ContextVar("alone", default=None)


@contextmanager
def alone(k: int) -> Iterator[None]:
    """Let the network's own modules read member k's tensors, as the modules of that member alone do."""
    token = _ALONE.set(k)
    try:
        yield
    finally:
        _ALONE.reset(token)


_GET_BUFFER = nn.Module.get_buffer.__code__


class Stacks(dict[str, Any]):
    """The parameters or buffers of one module, in the place of ``module._parameters`` or ``module._buffers``.

    Listed (optimizers, state dicts, ``to``) it has the stacks [K, ...]; read by name, as ``module.weight`` does, a
    :class:`MemberTensor`. A tensor that all members share is the same to both.

    Args:
        tensors: stacks and shared tensors by name.
        num_members: K.
        common: names of the shared ones.
        unsaved: names of buffers that no state dict has.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Any]],
        num_members: int,
        common: Iterable[str],
        unsaved: Iterable[str] = (),
    ) -> None:
        super().__init__(tensors)
        self.num_members = num_members
        self.common = set(common)
        self.unsaved = frozenset(unsaved)
        self._ndim = {n: t.ndim - (n not in self.common) for n, t in super().items() if t is not None}
        self._seen: dict[str, MemberTensor] = {}
        self.barrier: Any = None  # counts what replaces a tensor

    def __delitem__(self, name: str) -> None:
        raise ValueError(
            f"{name} is a stack of an ensemble and cannot be taken away, as parametrizations or pruning do: "
            "put those on the members, and make the ensemble of them"
        )

    def _written(self) -> None:
        if self.barrier is not None:
            self.barrier.writes += 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Stacks, (list(super().items()), self.num_members, self.common, self.unsaved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stacks:
        items = [(name, copy.deepcopy(tensor, memo)) for name, tensor in super().items()]
        return Stacks(items, self.num_members, self.common, self.unsaved)

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        if tensor is None:
            return None
        if tracing() or _SEEN.get() is not None:
            own = as_seen(standing_in(tensor))
            return own if name in self.common else MemberTensor(own, all_members(self.num_members))
        if name in self.common:
            return tensor
        k = _ALONE.get()
        if k is not None:
            return part_of(tensor, k)
        if name in self.unsaved and sys._getframe(2).f_code is _GET_BUFFER:
            return tensor  # torch.export takes what no state dict has by its name, for the program's constants
        seen = self._seen.get(name)
        if seen is None or seen.stack is not tensor:
            with torch.inference_mode(False), torch._C.DisableTorchFunction():  # it is kept for calls outside it
                seen = self._seen[name] = MemberTensor(tensor, all_members(self.num_members))
                STACKS[memory_of(tensor)] = tensor
        return seen

    def items(self) -> Any:
        """Names and stacks."""
        if _SEEN.get() is None:
            return super().items()
        return ((name, None if stack is None else as_seen(stack)) for name, stack in super().items())

    def values(self) -> Any:
        """The stacks."""
        return super().values() if _SEEN.get() is None else (stack for _, stack in self.items())

    def __setitem__(self, name: str, value: Any) -> None:
        """Take what replaces a tensor: member-valued, or, with a dimension less, the same for all members."""
        if isinstance(value, MemberTensor):
            self._ndim[name] = value.ndim
            if value.hidden is None:
                self.common.add(name)
            else:
                self.common.discard(name)
                self._seen[name] = value  # in the pass in progress it may be of rows
            value = value.stack
        elif isinstance(value, Tensor):
            ndim = self._ndim.get(name)
            if ndim is None or value.ndim == ndim:
                self.common.add(name)
            elif value.ndim == ndim + 1 and value.shape[0] == self.num_members:
                self.common.discard(name)
            else:
                raise ValueError(
                    f"{name} is {list(value.shape)}, expected the {self.num_members} members' values in front, "
                    f"[{self.num_members}, ...] of {ndim + 1} dimensions, or one for all of {ndim}"
                )
        super().__setitem__(name, value)
        self._written()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    # by the methods above
    update, setdefault = MutableMapping.update, MutableMapping.setdefault
    pop, popitem, clear = MutableMapping.pop, MutableMapping.popitem, MutableMapping.clear

    def forget(self) -> None:
        """Look at the stacks anew, which may have been moved or converted."""
        self._seen.clear()

    def unshared(self, name: str, tied: Tensor | None = None) -> Tensor:
        """Give each member a value of its own of a tensor that they share, or the stack of one that it is tied to."""
        tensor, stack = super().__getitem__(name), tied
        if stack is None:
            with torch.inference_mode(False), torch.no_grad():  # it is kept for calls outside it
                stack = tensor.detach().expand(self.num_members, *tensor.shape).clone()
            stack = nn.Parameter(stack, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stack
        self.common.discard(name)
        super().__setitem__(name, stack)
        self._written()
        return stack


def part_of(stack: Tensor, k: int) -> Tensor:
    """Member k's part of a stack: a parameter where that is one, but no leaf, so that gradients reach the stack."""
    own: Any = stack[k]
    if not isinstance(stack, nn.Parameter):
        return own
    if type(own) is Tensor and torch._C._functorch.peek_interpreter_stack() is None and not tracing():
        return own.as_subclass(nn.Parameter)
    own._is_param = True
    return own


class OfMember(dict[str, Any]):
    """One member's parameters or buffers, read from the stacks whenever they are read.

    Args:
        source: the stacks.
        k: the member.
    """

    def __init__(self, source: Stacks, k: int) -> None:
        super().__init__(dict.fromkeys(source))
        self.source, self.k = source, k
        self.own: set[str] = set()  # names whose values have no place in the stacks: those are in this dictionary
        # what was read in the call in progress, and where it was: the member may give it other memory, by ``data``
        self._given: dict[str, tuple[Tensor, int, tuple[bool, bool], int, bool]] = {}
        self._put: dict[str, Tensor] = {}  # what the member has put in the place of its own, in the call in progress

    def _read(self, name: str) -> Any:
        if name in self._put:
            return self._put[name]
        if name in self.own:
            return super().__getitem__(name)
        tensor = dict.__getitem__(self.source, name)
        if tensor is None:
            return None
        tensor = standing_in(tensor)
        if _SEEN.get() is not None:
            tensor = as_seen(tensor)
            return tensor if name in self.source.common else part_of(tensor, self.k)
        read = _READ.get()
        if read is not None:
            return read(tensor if name in self.source.common else part_of(tensor, self.k))
        if name in self.source.common:
            return tensor
        if traced((tensor,)):
            return part_of(tensor, self.k)
        before, mode = self._given.get(name), (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if before is not None:
            own, address, read_in, stack, required = before
            current = (read_in, stack, required) == (mode, id(tensor), tensor.requires_grad)
            if own.data_ptr() != address or (current and self._is_in_place(name, own)):
                return own  # to a member, one object
        own = part_of(tensor, self.k)
        self._given[name] = own, own.data_ptr(), mode, id(tensor), tensor.requires_grad
        return own

    def __getitem__(self, name: str) -> Any:
        with torch._C.DisableTorchFunction():  # that it is read is no use that the member's own code makes of it
            return self._read(name) if name in self.source or name in self._put else super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Take a member's new value, which :meth:`settle` keeps unless what was there comes back."""
        if isinstance(value, MemberTensor) and (value.hidden is None or value.hidden.size == 1):
            value = value.stack if value.hidden is None else value.stack[0]
        if name in self.source and name not in self.own and self._is_in_place(name, value):
            self._put.pop(name, None)
            return
        self._put[name] = value
        self.setdefault(name, None)

    def _is_in_place(self, name: str, value: Any) -> bool:
        """Whether a value is the member's part of the stack: what ``functional_call`` took out comes back."""
        stack = dict.__getitem__(self.source, name)  # a part of it, in a transform, has no memory to look at
        if not isinstance(value, Tensor) or stack is None or value.layout is not torch.strided:
            return value is stack
        while torch._C._functorch.is_gradtrackingtensor(value):  # a part that was read in a transform is its own
            value = torch._C._functorch.get_unwrapped(value)
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        own = 0 if name in self.source.common else 1
        offset = stack.storage_offset() + self.k * stack.stride(0) if own else stack.storage_offset()
        return value.untyped_storage()._cdata == stack.untyped_storage()._cdata and (
            (value.storage_offset(), value.shape, value.stride()) == (offset, stack.shape[own:], stack.stride()[own:])
        )

    def settle(self, keeps: bool, apart: bool = False) -> set[str]:
        """Keep what the member replaced in a call, apart from the stacks if asked, or drop it; return the names."""
        replaced = {name: own for name, (own, address, *_) in self._given.items() if own.data_ptr() != address}
        replaced |= self._put
        self._put, self._given = {}, {}
        for name, value in replaced.items():
            if apart:
                self._keep_here(name, value)
            elif keeps:
                with temporarily_clear_interpreter_stack():  # a transform lets nothing from outside be written to
                    self.keep(name, value)
            elif name not in self.source and name not in self.own:
                super().__delitem__(name)
        return set(replaced)

    def keep(self, name: str, value: Any) -> None:
        """Keep a value: in its place in the stack, or here where it has none, such as a cache that grows."""
        stack = dict.get(self.source, name)
        like = None if stack is None else stack if name in self.source.common else stack[self.k]
        if like is None or not isinstance(value, Tensor) or (
            (like.shape, like.dtype, like.device) != (value.shape, value.dtype, value.device)
            or torch._C._functorch.is_functorch_wrapped_tensor(value)
        ):  # fmt: skip
            self._keep_here(name, value)
            return
        self.own.discard(name)
        if name in self.source.common:
            self.source.unshared(name)
        place = dict.__getitem__(self.source, name).data[self.k]
        with torch.inference_mode() if place.is_inference() else torch.no_grad():
            place.copy_(value.detach())

    def _keep_here(self, name: str, value: Any) -> None:
        self.own.add(name)
        super().__setitem__(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a name."""
        return self[name] if name in self else default  # noqa: SIM401  (it is what it would call)

    def items(self) -> Any:
        """Names and values."""
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        """Values."""
        return [self[name] for name in self]


def tables_of(network: nn.Module) -> list[tuple[str, nn.Module, Stacks]]:
    """Every table of a folded network, with the path of its module and the module."""
    return [
        (path, module, table)
        for path, module in modules_of(network)
        for table in (module._parameters, module._buffers)
        if isinstance(table, Stacks)
    ]


def unshare(network: nn.Module, names: Iterable[str]) -> bool:
    """Give each member its own of shared tensors, ties kept; return whether any of these names was shared."""
    wanted = set(names)
    shared = [
        (table, name, dict.__getitem__(table, name), f"{path}.{name}" if path else name)
        for path, _, table in (tables_of(network) if wanted else ())
        for name in table.common
    ]
    stacks: dict[int, Any] = {id(x): None for _, _, x, full in shared if full in wanted and x is not None}
    for table, name, tensor, _ in shared:
        if id(tensor) in stacks:
            stacks[id(tensor)] = table.unshared(name, stacks[id(tensor)])
    return bool(stacks)


def settle(view: nn.Module, keeps: bool, apart: bool = False) -> None:
    """Settle what a member's own code replaced in its tables; see :meth:`OfMember.settle`."""
    for _, module in modules_of(view):
        for table in (module._parameters, module._buffers):
            if isinstance(table, OfMember):
                table.settle(keeps, apart)


def view_of_member(network: nn.Module, k: int) -> nn.Module:
    """Member k as a module of its own, whose tensors are parts of the stacks and whose Python state is a copy."""
    memo: dict[int, Any] = {}
    for _, _, table in tables_of(network):
        for name, stack in table.items():
            if stack is not None:
                own = stack if name in table.common else stack[k]
                memo[id(stack)] = own
                memo[id(table[name])] = own
    for value in member_values(network):  # what its forward left behind in attributes
        memo[id(value)] = value.stack if value.hidden is None else value.stack[k]
    view = copy.deepcopy(network, memo)
    for module, original in zip(view.modules(), network.modules(), strict=True):
        for name in ("_parameters", "_buffers"):
            table = original.__dict__[name]
            if isinstance(table, Stacks):
                module.__dict__[name] = OfMember(table, k)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.__dict__["sparse"] = False  # the gradient of a part of a stack is none that torch has sparsely
    return view
