"""What a network was before a method changed it, to go back to where that fails halfway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.fold.nested import leaves_of
from fastens.fold.tensor import TABLES, MemberTensor, NotFoldable, member_valued, memory_of, tensors_of
from fastens.fold.writes import NeedsWrappers, writes_to
from fastens.network.snapshots import snapshots_of
from fastens.network.tables import Stacks


class Rollback(TorchFunctionMode):
    """What a network consisted of: Python state, gradients, what is trained; in its scope, values that are written to.

    What each member is to do itself is an error there: a tensor that all share takes no values of each member's, and
    ``torch.nn.init`` initialises one tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        modules = list(network.modules())
        seen = {id(each) for each in (*modules, *tensors_of(network).values())}
        self._state = [
            (module, vars(module).copy(), [held for name, value in vars(module).items()
                                           if name not in (*TABLES, "_barrier") for held in snapshots_of(value, seen)])
            for module in modules
        ]  # fmt: skip
        tables = [state[name] for _, state, _ in self._state for name in TABLES]
        self._tables: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
            (table, dict(dict.items(table)), set(getattr(table, "common", ()))) for table in tables
        ]
        self._versions = {name: tensor._version for name, tensor in tensors_of(network).items()}
        self._network = network
        held = list(tensors_of(network).values())
        self._trained = [(x, x.grad, x.requires_grad) for x in held if isinstance(x, nn.Parameter)]
        gradients = [grad for _, grad, _ in self._trained if grad is not None]
        self._tensors = {memory_of(tensor): tensor for tensor in (*held, *gradients)}
        self._written: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # tensor, its memory, and the values there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__ and any(map(member_valued, leaves_of((args, kwargs)))):
            raise NotFoldable(f"{func.__name__} is of one member's tensor, to which it gives draws of its own")
        with torch._C.DisableTorchFunction():
            targets = [args[0]] if args and writes_to(func, args, kwargs) else []
            targets += [kwargs["out"]] if kwargs.get("out") is not None else []
            for target in leaves_of(targets):
                self._save(target)
        if func == _SET_DATA and not member_valued(args[0]) and member_valued(args[1]):
            raise NeedsWrappers(args[0])
        return func(*args, **kwargs)

    def _save(self, target: Any) -> None:
        stack = target.stack if isinstance(target, MemberTensor) else target
        held = self._tensors.get(memory_of(stack)) if isinstance(stack, Tensor) else None
        for each in () if held is None else (held, held.grad if held.is_leaf else None):  # which may be what is set
            if each is not None and id(each) not in self._written:
                self._written[id(each)] = each, each.data, each.detach().clone()

    def changed_inside(self) -> bool:
        """Whether what attributes hold was changed in place, as lists are, of which no write to a module tells."""
        return any(not each.kind.same(each.value, each.saved) for _, _, held in self._state for each in held)

    def restore(self) -> bool:
        """Go back; return whether that is all, which it is not where values were changed past torch's functions."""
        for module, state, held in self._state:
            vars(module).clear()
            vars(module).update(state)
            for each in held:
                each.restored()
        for table, content, common in self._tables:
            dict.clear(table)
            dict.update(table, content)
            if isinstance(table, Stacks):
                table.common = common
        for tensor, memory, values in self._written.values():
            tensor.data = memory
            with torch.no_grad():
                tensor.copy_(values)
        for parameter, grad, trained in self._trained:
            parameter.grad = grad
            parameter.requires_grad_(trained)
        tensors = tensors_of(self._network)
        versions = {name: tensor._version for name, tensor in tensors.items() if id(tensor) not in self._written}
        return tensors.keys() == self._versions.keys() and versions.items() <= self._versions.items()


_SET_DATA = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]  # a wrapper, made anew whenever it is read
