"""Modules that members make, replace or remove when they are called.

Those without tensors are Python state as any other. Those with tensors would be no part of the stacks: nobody would
train them, convert them or save them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastens.fold.dispatch import current_fold
from fastens.fold.tensor import tensors_of
from fastens.network.snapshots import held_tensors


class MadeWhenCalled(ValueError):
    """Members make, replace or remove modules that have tensors when they are called.

    Args:
        names: paths of the modules.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(
            f"members make, replace or remove modules when they are called ({', '.join(sorted(names)[:3])}): "
            "call every member once, and make the ensemble of them then"
        )


def has_tensors(module: Any) -> bool:
    """Whether a module has parameters, buffers, or tensors in attributes."""
    return isinstance(module, nn.Module) and bool(tensors_of(module) or held_tensors(module))


def is_apart(module: nn.Module) -> bool:
    """Whether a module of a member is none of the network's, whose tables are read from the stacks."""
    return type(module._parameters) is dict


def allow_in_passes(table: dict[str, Any], args: tuple[Any, ...]) -> None:
    """Refuse what a network's own code does to modules that have tensors in a pass of all members.

    Args:
        table: of modules.
        args: of the method that is about to write to it.
    """
    if current_fold() is None:
        return
    now = [*table.values()] if not args or not isinstance(args[0], str) else [table.get(args[0])]
    if len(args) == 2 and now[0] is args[1]:
        return
    if any(map(has_tensors, (*now, *args))):
        raise MadeWhenCalled([str(args[0]) if args else "all of them"])
