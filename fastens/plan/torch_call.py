"""An operation of torch in a plan: it writes to memory that was laid out beforehand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.ops._rows import is_dense


def call(outs: Sequence[Tensor], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], exact: bool = True) -> None:
    """An operation of torch; one that changes an argument changes a copy, since values are written once.

    Args:
        outs: where its results go.
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        exact: whether ``outs`` have the dtypes of the results.
    """
    if func._schema.is_mutable:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    elif exact and all(map(is_dense, outs)):
        overload, names = _writing(func)
        if overload is not None and len(names) == len(outs):
            overload(*args, **kwargs, **dict(zip(names, outs, strict=True)))
            return
    results = [r for r in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(r, Tensor)]
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)


@functools.cache
def _writing(function: Any) -> tuple[Any, tuple[str, ...]]:
    """The overload of an operation that writes into given tensors, and the names of those arguments; or none."""

    def described(arguments: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in arguments if not a.is_out]

    wanted = described(function._schema.arguments)
    for name in function.overloadpacket.overloads():
        overload = getattr(function.overloadpacket, name)
        names = tuple(a.name for a in overload._schema.arguments if a.is_out)
        if names and described(overload._schema.arguments) == wanted:
            return overload, names
    return None, ()
