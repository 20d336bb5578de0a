"""One member's parameters and buffers: parts of the stacks, or what it put in their place."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastens.fold.attributes import SetWhenCalled, attributes_of, set_since, standing_for
from fastens.fold.stand_ins import standing_in, traced
from fastens.fold.tensor import MemberTensor, memory_of, modules_of, tensors_of
from fastens.network.deep_copies import copied
from fastens.network.gradients import set_gradient
from fastens.network.made import MadeWhenCalled, has_tensors, is_apart
from fastens.network.own_part import part_of
from fastens.network.parts import COPIED, Parts, Reference
from fastens.network.snapshots import exchange, member_values
from fastens.network.tables import Stacks, as_seen, part_as_seen, seen_otherwise, tables_of
from fastens.scopes import scope

_READ: contextvars.ContextVar[Callable[[Tensor], Tensor] | None] = contextvars.ContextVar("read", default=None)


def read_through(change: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Scope in which members' own modules read ``change(part)`` in the place of their part of a stack."""
    return scope(_READ, change)


_CALLED: contextvars.ContextVar[bool] = contextvars.ContextVar("called", default=False)


def called() -> AbstractContextManager[Any]:
    """Scope of a call of a member's own code, whose reads and writes :func:`settle` settles.

    What an activation checkpoint runs again in the backward pass is in no call: it finds the member as it is then.
    """
    return scope(_CALLED, True)


class MemberTable(dict[str, Any]):
    """One member's parameters or buffers, read from the stacks whenever they are read.

    Args:
        source: the stacks.
        k: the member.
        parts: what was read of each stack by all its tables, while it is held: tied tensors are one object.
    """

    def __init__(self, source: Stacks, k: int, parts: Parts) -> None:
        super().__init__(dict.fromkeys(source))
        self.source, self.k, self.parts = source, k, parts
        self.own: set[str] = set()  # names whose values have no place in the stacks: those are in this dictionary
        # what was read in the call in progress, and where it was: the member may give it other memory, by ``data``
        self._given: dict[str, tuple[Tensor, int, Any, int]] = {}
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
        if seen_otherwise():
            return as_seen(tensor) if name in self.source.common else part_as_seen(tensor, self.k)
        read = _READ.get()
        if read is not None:
            return read(tensor if name in self.source.common else part_of(tensor, self.k))
        if name in self.source.common:
            return tensor
        if traced(tensor):
            return part_of(tensor, self.k)
        settled = _CALLED.get()
        if not settled and self.parts.asked and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"a member that asks what its weights are (is_leaf, grad, ...) reads {name} in a backward pass, where "
                "an ensemble cannot answer for one member: switch its activation checkpoints off"
            )
        before = self._given.get(name) if settled else None
        copied = settled and bool(COPIED) and id(tensor) in COPIED
        read = (None, id(tensor), tensor.requires_grad) if copied else _key(tensor)
        if before is not None:
            own, address, read_before, _ = before
            if own.data_ptr() != address or (
                read_before == read and (copied or self.source.has_part(name, self.k, own))
            ):
                return own  # to a member, one object
        own = self.parts.get(read)
        if own is None or not (copied or self.source.has_part(name, self.k, own)):
            own = self.parts[read] = self._copied(tensor) if copied else _part(tensor, self.k)
        elif name not in self._given:
            standing_for(own, tensor)
        if settled:
            first = before[-1] if before is not None and before[2][1] == id(tensor) else _version(own)  # of all parts
            self._given[name] = own, own.data_ptr(), read, first
        return own

    def _copied(self, stack: Tensor) -> Tensor:
        with torch.enable_grad():
            return part_of(stack, self.k, copied=True)

    def __getitem__(self, name: str) -> Any:
        if torch.compiler.is_dynamo_compiling() and name in self.source and name not in self.own:  # in torch.cond
            stack = dict.__getitem__(self.source, name)
            return stack if stack is None or name in self.source.common else stack[self.k]
        with torch._C.DisableTorchFunction():  # that it is read is no use that the member's own code makes of it
            return self._read(name) if name in self.source or name in self._put else super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Take a member's new value, which :meth:`settle` keeps unless what was there comes back."""
        if isinstance(value, MemberTensor) and (value.hidden is None or value.hidden.size == 1):
            value = value.stack if value.hidden is None else value.stack[0]
        given = self._given.get(name)
        back = given is not None and given[0] is value
        with torch._C.DisableTorchFunction():
            back = back or (name in self.source and self.source.has_part(name, self.k, value))
        if back and name in self.source and name not in self.own:
            self._put.pop(name, None)
            return
        self._put[name] = value
        self.setdefault(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """What a copy of the member's module has, which its code makes: tensors of its own."""
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}

    def attributes_set(self) -> list[str]:
        """What the member set on its tensors in the call in progress, by the names of tensors and attributes."""
        found: list[str] = []
        for name, (own, *_) in list(self._given.items()) if self._given else ():
            like = dict.get(self.source, name)
            if like is not None and (vars(own) or vars(like)):
                found += [f"{name}.{each}" for each in set_since(own, attributes_of(like))]
        return found

    def settle(self, keeps: bool, apart: bool = False, copies: bool = False) -> set[str]:
        """Keep what the member replaced in a call, apart from the stacks if asked, or drop it; return the names.

        Args:
            keeps: whether it is kept.
            apart: apart from the stacks.
            copies: whether members get copies from now on of what this one wrote to in place.
        """
        if not (self._given or self._put):
            return set()
        given = list(self._given.items())  # at once: other threads read as well
        replaced = {name: own for name, (own, address, *_) in given if own.data_ptr() != address}
        written = {name: own for name, (own, *_, before) in given if own.is_inference() or _version(own) != before}
        stacks = {name: dict.get(self.source, name) for name in written}
        replaced |= {name: own for name, own in written.items() if id(stacks[name]) in COPIED}
        if copies and torch.is_grad_enabled():
            COPIED.update((id(stack), stack) for stack in stacks.values() if stack is not None)
        put, self._put, self._given = self._put, {}, {}
        replaced |= put
        for _, (_, _, read, _) in given:
            if read[0] is None:  # a copy of this call
                self.parts.pop(read, None)
        for name, value in replaced.items():
            if apart:
                self._keep_here(name, value)
            elif keeps:
                with temporarily_clear_interpreter_stack():  # a transform lets nothing from outside be written to
                    self.keep(name, value)
                    self._begin_anew(name, put.get(name))
            elif name not in self.source and name not in self.own:
                super().__delitem__(name)
        return set(replaced)

    def _begin_anew(self, name: str, put: Any) -> None:
        """Of a parameter that a member put in the place of its own: it has no gradient, and is trained or not."""
        stack = dict.get(self.source, name)
        if isinstance(put, nn.Parameter) and isinstance(stack, nn.Parameter) and name not in self.own:
            stack.requires_grad_(put.requires_grad)
            set_gradient(stack, self.k, None)

    def keep(self, name: str, value: Any) -> None:
        """Keep a value: in its place in the stack, or here where it has none, such as a cache that grows."""
        stack = dict.get(self.source, name)
        like = None if stack is None else stack if name in self.source.common else stack[self.k]
        if like is None or not isinstance(value, Tensor) or (
            (like.shape, like.dtype, like.device) != (value.shape, value.dtype, value.device)
            or is_functorch_wrapped_tensor(value)
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


def _key(stack: Tensor) -> tuple[bool, int, bool]:
    """What tells a part of a stack, as it is read here, from others."""
    return torch.is_inference_mode_enabled(), id(stack), stack.requires_grad


def _part(stack: Tensor, k: int) -> Tensor:
    """Member k's part of a stack, to use where gradients are enabled and where they are not.

    One that is made where they are not cannot be differentiated, nor be looked at once the stack was written to.
    """
    if torch.compiler.is_compiling():  # whose graph would have the mode in it
        return part_of(stack, k)
    with torch.enable_grad():
        return part_of(stack, k)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def parts_of(view: nn.Module) -> Parts | None:
    """The parts of stacks that a member read and that are still there, by the mode and the identity of each stack."""
    table = view._parameters
    return table.parts if isinstance(table, MemberTable) else None


def take_parts(view: nn.Module, other: nn.Module) -> dict[int, Tensor]:
    """Let a member read the parts of stacks that another module of the same member holds, where it has none itself.

    Returns:
        By the identity of each, what the member reads.
    """
    own, parts = parts_of(view), parts_of(other)
    if own is None or parts is None:
        return {}
    found: dict[int, Tensor] = {}
    for key, part in list(parts.items()):
        read = own.get(key)
        if read is None or memory_of(read) != memory_of(part):
            own[key] = read = part
        found[id(part)] = read
    return found


def renew_parts(view: nn.Module, references: list[Reference]) -> list[Reference]:
    """Let attributes of a member hold parts of the stacks as they are now; return the references that are its own."""
    table = view._parameters
    if not isinstance(table, MemberTable):
        return []
    parts, others, own = table.parts, {}, []
    read = {id(part) for part in parts.values()}
    for reference in [each for each in references if id(each.part) in read]:
        if reference.stale:
            key, part = _key(reference.stack), _part(reference.stack, table.k)
            others[id(reference.part)] = parts[key] = part
            own.append(Reference(part, reference.stack, key[2]))
        else:
            own.append(reference)
    if others:
        exchange(view, others)
    return own


def names_read(module: nn.Module) -> dict[int, str]:
    """The names of a module's tensors by identity; of a member's, by those of all that it read and that is there."""
    found = {id(tensor): name for name, tensor in tensors_of(module).items()}
    for path, each in modules_of(module):
        for table in (each._parameters, each._buffers):
            if isinstance(table, MemberTable):
                stacks = {id(stack): f"{path}.{name}" if path else name for name, stack in dict.items(table.source)}
                found |= {id(x): stacks[key[1]] for key, x in list(table.parts.items()) if key[1] in stacks}
    return found


def read_by(view: nn.Module) -> dict[int, int]:
    """The identities of the parts of stacks that a member read and that are still there, with those of the stacks."""
    parts = parts_of(view)
    return {} if parts is None else {id(part): read[1] for read, part in list(parts.items())}


def settle(view: nn.Module, keeps: bool, apart: bool = False, copies: bool = False) -> None:
    """Settle what a member's own code replaced in its tables; see :meth:`MemberTable.settle`.

    Raises:
        MadeWhenCalled: it put modules into the member, which are taken out again.
        SetWhenCalled: it set attributes of its parameters or buffers, which are gone.
    """
    made, attributes = list[str](), list[str]()
    for path, module in modules_of(view):
        parameters = module._parameters
        for table in (parameters, module._buffers):
            if isinstance(table, MemberTable):
                attributes += [f"{path}.{name}" if path else name for name in table.attributes_set()]
                table.settle(keeps, apart, copies)
        if isinstance(parameters, MemberTable):
            found = [
                name
                for name, child in module._modules.items()
                if child is not None and is_apart(child) and has_tensors(child)
            ]
            made += found
            for name in found:
                del module._modules[name]
    if made:
        raise MadeWhenCalled(made)
    if attributes:
        raise SetWhenCalled(attributes)


def view_of_member(network: nn.Module, k: int) -> tuple[nn.Module, list[Reference]]:
    """Member k as a module of its own, whose tensors are parts of the stacks and whose Python state is a copy.

    Second, what attributes of it refer to past its tables.
    """
    memo: dict[int, Any] = {}
    parts = Parts(k)
    references: list[tuple[Any, Tensor]] = []
    for _, _, table in tables_of(network):
        for name, stack in table.items():
            if stack is None or id(stack) in memo:
                continue
            own = stack if name in table.common else _part(stack, k)
            memo[id(stack)] = memo[id(table[name])] = own
            if own is not stack:
                parts[key := _key(stack)] = own
                references.append((key, stack))
    for value in member_values(network):  # what its forward left behind in attributes
        if id(value) not in memo:
            memo[id(value)] = value.stack if value.hidden is None else value.stack[k]
    view, own = copied(network, memo), None
    for module, original in zip(view.modules(), network.modules(), strict=True):
        for name in ("_parameters", "_buffers"):
            table = original.__dict__[name]
            if isinstance(table, Stacks):
                module.__dict__[name] = MemberTable(table, k, parts)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.__dict__["sparse"] = False  # the gradient of a part of a stack is none that torch has sparsely
    memo.clear()  # of the parts, those are left that attributes hold
    return view, [Reference(parts[key], stack, key[2]) for key, stack in references if key in parts]
