"""Calls of members' methods, and whether their parameters enter what a method computes."""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.fold.rules.metadata import METADATA
from fastens.fold.tensor import MemberTensor, modules_of
from fastens.network.member_tables import MemberTable
from fastens.scopes import scope

_NOTED: contextvars.ContextVar[list[bool] | None] = contextvars.ContextVar("noted", default=None)


def entering() -> AbstractContextManager[list[bool]]:
    """A list that gets an item when a function takes a parameter of a network that is called in this scope."""
    return scope(_NOTED, [])


def _noted(network: nn.Module) -> AbstractContextManager[Any]:
    """Scope of a call of a network, in which its parameters are looked for where :func:`entering` asks."""
    found = _NOTED.get()
    return nullcontext() if found is None or torch.compiler.is_compiling() else _Entering(network, found)


def call(network: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a network; ``forward`` with its hooks."""
    with nullcontext() if method == "forward" else _noted(network):
        return network(*args, **kwargs) if method == "forward" else getattr(network, method)(*args, **kwargs)


class _Entering(TorchFunctionMode):
    """Looks for a network's parameters among what functions take; shape, dtype and device of one are no use of it."""

    def __init__(self, network: nn.Module, found: list[bool]) -> None:
        super().__init__()
        tables = [module._parameters for _, module in modules_of(network)]
        held = [table.source if isinstance(table, MemberTable) else table for table in tables]
        self.parameters = {_memory(x) for table in held for x in dict.values(table) if x is not None}
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found and func not in METADATA:
            leaves = pytree.tree_leaves((args, kwargs))
            if any(isinstance(x, Tensor) and _memory(x) in self.parameters for x in leaves):
                self.found.append(True)
        return func(*args, **(kwargs or {}))


def _memory(x: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        own = x.stack if isinstance(x, MemberTensor) else x
        return own.untyped_storage()._cdata if own.layout is torch.strided else id(own)
