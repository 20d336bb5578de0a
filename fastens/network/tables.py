"""Where a module of the folded network keeps its tensors: stacks to who lists them, one member's to its own code."""

from __future__ import annotations

import contextvars
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)
from torch.nn.parameter import is_lazy
from torch.nn.utils._named_member_accessor import swap_tensor

from fastens.fold.attributes import attributes_of, give, standing_for
from fastens.fold.callsite import callers
from fastens.fold.dispatch import current_fold
from fastens.fold.stand_ins import standing_in, tracing
from fastens.fold.tensor import MemberTensor, all_members, memory_of, modules_of, of_stack
from fastens.fold.writes import STACKS
from fastens.network.own_part import part_of
from fastens.network.snapshots import exchange
from fastens.network.whole import check_whole
from fastens.scopes import scope


class _Seen:
    """What networks and members read in the place of the stacks; members' parts are kept where they are one object."""

    def __init__(self, change: Callable[[Tensor], Tensor], kept: bool) -> None:
        self.change = change
        self._parts: dict[Any, Tensor] | None = {} if kept else None

    def part(self, stack: Tensor, k: int) -> Tensor:
        """Member k's part of what is read in the place of a stack."""
        seen = standing_for(self.change(stack), stack)
        if self._parts is None:
            return part_of(seen, k)
        key = id(seen), k, torch.is_grad_enabled()
        if key not in self._parts:
            self._parts[key] = part_of(seen, k)
        return self._parts[key]


_SEEN: contextvars.ContextVar[_Seen | None] = contextvars.ContextVar("seen", default=None)


def seen_as(change: Callable[[Tensor], Tensor], kept: bool = False) -> AbstractContextManager[Any]:
    """Scope in which networks and members read ``change(stack)``; the stacks themselves are not written to.

    Args:
        change: gives another tensor for a stack.
        kept: whether it gives one object whenever it is asked, of which a member's part is one object as well.
    """
    return scope(_SEEN, _Seen(change, kept))


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, of a parameter a parameter; inside a pass, too, it is no wrapper."""
    if tensor.dtype == dtype:
        return tensor
    with torch._C.DisableTorchFunction():
        other = tensor.to(dtype)
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


def seen_otherwise() -> bool:
    """Whether networks and members read other values than the stacks hold."""
    return _SEEN.get() is not None


def as_seen(tensor: Tensor) -> Tensor:
    """What a network reads in the place of a stack."""
    seen = _SEEN.get()
    return tensor if seen is None else standing_for(seen.change(tensor), tensor)


def part_as_seen(stack: Tensor, k: int) -> Tensor:
    """What member k reads as its part of a stack, while networks read other values."""
    seen = _SEEN.get()
    return part_of(stack, k) if seen is None else seen.part(stack, k)


_ALONE: contextvars.ContextVar[int | None] = contextvars.ContextVar("alone", default=None)


def alone(k: int) -> AbstractContextManager[Any]:
    """Let the network's own modules read member k's tensors, as the modules of that member alone do."""
    return scope(_ALONE, k)


_LISTED: contextvars.ContextVar[bool] = contextvars.ContextVar("listed", default=False)


def listed_as_read() -> AbstractContextManager[Any]:
    """Scope of the network's own code outside a pass, to which parameters are listed as its members have them.

    State dicts that it makes or loads have the stacks.
    """
    return scope(_LISTED, True)


_LOADS = "_load_from_state_dict"
_FILES = {nn.Module._save_to_state_dict.__code__, nn.Module._load_from_state_dict.__code__}


def _asked_for_stack() -> bool:
    """Whether a table is read by torch's code for state: an export's, functional calls', a module's own way to load.

    These are called on the root of what holds the ensemble, which may be a module of the user's, so there is no class
    of ours in which to override them: only the frames tell that the stack is asked for, and not what a member sees.
    """
    frames = list(itertools.islice(callers(), 2, 4))  # behind us and the table: who asks the table, or asks the module
    if frames and frames[0].f_code is swap_tensor.__code__:
        return True
    code = frames[1].f_code if len(frames) > 1 else None
    return code is not None and (code is nn.Module.get_buffer.__code__ or code.co_name == _LOADS)


class Stacks(dict[str, Any]):
    """The parameters or buffers of one module, in the place of ``module._parameters`` or ``module._buffers``.

    Listed (optimizers, state dicts, ``to``) it has the stacks [K, ...]; read by name, as ``module.weight`` does, or
    listed by the network's own code in a pass, a :class:`MemberTensor`. A tensor that all members share is the same to
    both.

    Args:
        tensors: stacks and shared tensors by name.
        num_members: K.
        common: names of the shared ones.
        put_in: whether the module was put in later, whose parameters stay one object in all members.
        unsaved: names of buffers that no state dict has.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Any]],
        num_members: int,
        common: Iterable[str],
        put_in: bool = False,
        unsaved: Iterable[str] = (),
    ) -> None:
        super().__init__(tensors)
        self.num_members, self.put_in = num_members, put_in
        self.common = set(common)
        self.unsaved = frozenset(unsaved)
        self._ndim = {n: t.ndim - (n not in self.common) for n, t in super().items() if t is not None}
        self._seen: dict[str, MemberTensor] = {}
        self.barrier: Any = None  # counts what replaces a tensor

    def __delitem__(self, name: str) -> None:
        raise _fixed(name)

    def withdraw(self, name: str, empty: bool = False) -> None:
        """Take away what a pass that is undone registered, or put where there was a name without a tensor."""
        super().__setitem__(name, None) if empty else super().pop(name)
        self.common.discard(name)
        self._ndim.pop(name, None)
        self._seen.pop(name, None)
        self._written()

    def _written(self) -> None:
        if self.barrier is not None:
            self.barrier.wrote()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Stacks, (list(super().items()), self.num_members, self.common, self.put_in, self.unsaved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stacks:
        items = [(name, copy.deepcopy(tensor, memo)) for name, tensor in super().items()]
        for tensor, (_, own) in zip(super().values(), items, strict=True):
            if own is not None and type(own) is nn.Parameter:  # which copies of torch's come without
                give(own, copy.deepcopy(attributes_of(tensor), memo))
        return Stacks(items, self.num_members, self.common, self.put_in, self.unsaved)

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
        if not self._in_pass() and _asked_for_stack():
            return tensor
        seen = self._seen.get(name)
        if seen is None or seen.stack is not tensor or not seen.fits():
            seen = self._seen[name] = of_stack(tensor, self.num_members)
            STACKS[memory_of(tensor)], seen.told = tensor, self._written
        return seen

    def stacks(self) -> list[Tensor]:
        """What there is of them, whoever asks."""
        return [tensor for tensor in super().values() if tensor is not None]

    def items(self) -> Any:
        """Names and stacks; in a pass of the network, or of one member alone, what its members see."""
        if self._in_pass():
            return [(name, self[name]) for name in self]
        if _SEEN.get() is None:
            return super().items()
        return ((name, None if stack is None else as_seen(stack)) for name, stack in super().items())

    def values(self) -> Any:
        """The stacks; in a pass of the network, what its members see."""
        plain = _SEEN.get() is None and not self._in_pass()
        return super().values() if plain else (tensor for _, tensor in self.items())

    def _in_pass(self) -> bool:
        fold = current_fold()
        if fold is not None:
            return id(self) in fold.tables
        if _ALONE.get() is not None:
            return True
        return _LISTED.get() and _FILES.isdisjoint(frame.f_code for frame in itertools.islice(callers(), 6))

    def __setitem__(self, name: str, value: Any) -> None:
        """Take what replaces a tensor: member-valued, or, with a dimension less, the same for all members."""
        if isinstance(value, Tensor) and self.holds(name, value):
            return
        if name not in self and isinstance(value, Tensor) and not self._in_pass():
            moved = next((n for n in self if self.holds(n, value)), None)
            if moved is not None:  # pruning does so first, and takes it away next
                raise _fixed(moved)
        if isinstance(value, MemberTensor):
            self._ndim[name] = value.ndim
            if value.hidden is None:
                self.common.add(name)
            else:
                self.common.discard(name)
                self._seen[name] = value  # in the pass in progress it may be of rows
            tied = isinstance(value.stack, nn.Parameter) or current_fold() is not None  # else made of what members read
            made = isinstance(value, nn.Parameter) and not tied
            value = nn.Parameter(value.stack.detach(), value.requires_grad) if made else value.stack
        elif isinstance(value, Tensor):
            check_whole(name, value)
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

    def holds(self, name: str, value: Any) -> bool:
        """Whether a value is what the network reads by a name, so that to write it there changes nothing."""
        k = _ALONE.get()
        return name in self and (value is self[name] if k is None else self.has_part(name, k, value))

    def has_part(self, name: str, k: int, value: Any) -> bool:
        """Whether a value is member k's part of a stack: what ``functional_call`` took out comes back."""
        stack = super().__getitem__(name)  # a part of it, in a transform, has no memory to look at
        if not isinstance(value, Tensor) or stack is None or value.layout is not torch.strided:
            return value is stack
        while is_gradtrackingtensor(value):  # a part that was read in a transform is its own
            value = get_unwrapped(value)
        if is_functorch_wrapped_tensor(value):
            return False
        own = 0 if name in self.common else 1
        offset = stack.storage_offset() + k * stack.stride(0) if own else stack.storage_offset()
        return value.untyped_storage()._cdata == stack.untyped_storage()._cdata and (
            (value.storage_offset(), value.shape, value.stride()) == (offset, stack.shape[own:], stack.stride()[own:])
        )

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
        """Give each member a value of its own of a tensor that they share, or the stack of one that it is tied to.

        Of a parameter the stack is the same object, which an optimizer may hold.
        """
        tensor, stack = super().__getitem__(name), tied
        if stack is None:
            with torch.inference_mode(False), torch.no_grad():  # it is kept for calls outside it
                stack = tensor.detach().expand(self.num_members, *tensor.shape).clone()
            stack = _grown(tensor, stack, name) if isinstance(tensor, nn.Parameter) else stack
            standing_for(stack, tensor)
        self.common.discard(name)
        super().__setitem__(name, stack)
        self._written()
        return stack


def _grown(parameter: nn.Parameter, stack: Tensor, name: str) -> nn.Parameter:
    """A parameter with other values and a dimension more: the same object, unless a graph needs it as it was."""
    if parameter.is_inference():
        return nn.Parameter(stack, parameter.requires_grad)
    held: Any = parameter  # torch's stub has no count of its uses
    if held._use_count() > 1 or parameter.grad is not None:
        warnings.warn(
            f"fastens: {name} {list(parameter.shape)} is another parameter from now on, with values for each member, "
            "since a graph or a view holds the one that it was, or that has a gradient: an optimizer made before does "
            "not train it; make it anew where it should",
            stacklevel=2,
        )
        return nn.Parameter(stack, parameter.requires_grad)
    parameter.data = stack
    return parameter


def _fixed(name: str) -> ValueError:
    return ValueError(
        f"{name} is a stack of an ensemble and cannot be taken away, as parametrizations, pruning and FSDP do: put the "
        "former on the members, and make the ensemble of them; DistributedDataParallel trains on several devices"
    )


def unsaved_in(module: nn.Module, table: str) -> set[str]:
    """Names in a module's table that no state dict has."""
    return module._non_persistent_buffers_set if table == "_buffers" else set()


def tables_of(network: nn.Module) -> list[tuple[str, nn.Module, Stacks]]:
    """Every table of a folded network, with the path of its module and the module.

    A module that was put in later has tables of its own, which become tables of what all members share.

    Raises:
        ValueError: its weights have no shape yet.
    """
    names = "_parameters", "_buffers"
    found = [(path, module, name, vars(module).get(name)) for path, module in modules_of(network) for name in names]
    num_members = next((table.num_members for *_, table in found if isinstance(table, Stacks)), None)
    tables: list[tuple[str, nn.Module, Stacks]] = []
    for path, module, name, table in found:
        if num_members is not None and type(table) is dict:
            _check_made(path, table)
            unsaved = unsaved_in(module, name)
            table = vars(module)[name] = Stacks(table.items(), num_members, table, put_in=True, unsaved=unsaved)
        if isinstance(table, Stacks):
            tables.append((path, module, table))
    return tables


def _check_made(path: str, table: dict[str, Any]) -> None:
    for name, tensor in table.items():
        if is_lazy(tensor):
            raise ValueError(
                f"{path}.{name}, which was put into an ensemble, has no shape before the first call of its module: "
                f"call {path} once by itself, on what it will get in the network, or put in a module that has weights"
            )


def unshare(network: nn.Module, names: Iterable[str]) -> bool:
    """Give each member its own of shared tensors, ties kept; return whether any of these names was shared."""
    wanted = set(names)
    shared = [
        (table, name, dict.__getitem__(table, name), f"{path}.{name}" if path else name)
        for path, module, table in (tables_of(network) if wanted else ())
        for name in table.common
        if not (table.put_in and name in vars(module)["_parameters"])
    ]
    stacks: dict[int, Any] = {id(x): None for _, _, x, full in shared if full in wanted and x is not None}
    for table, name, tensor, _ in shared:
        if id(tensor) in stacks:
            stacks[id(tensor)] = table.unshared(name, stacks[id(tensor)])
    if stacks:  # attributes that refer to one refer to what the tables give for it
        exchange(network, {old: of_stack(stack, shared[0][0].num_members) for old, stack in stacks.items()})
    return bool(stacks)
