"""Objects among the arguments, of which all members get the same: generators, and what hides its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastens.engine.arguments import Arguments
from fastens.engine.copies import is_plain
from fastens.fold.tensor import NotFoldable
from fastens.network.snapshots import snapshots_of


@contextmanager
def objects_kept(arguments: Arguments) -> Iterator[list[str]]:
    """Scope of code that is tried: what it does to objects among the arguments is undone.

    Args:
        arguments: of the call.

    Yields:
        The classes of those that it changed, once the scope ends.
    """
    objects = [x for x in arguments.leaves if not (isinstance(x, torch.Tensor) or is_plain(x))]
    seen: set[int] = set()
    kept = [(type(x).__name__, each) for x in objects for each in snapshots_of(x, seen)]
    changed: list[str] = []
    try:
        yield changed
    finally:
        changed += dict.fromkeys(name for name, each in kept if each.restored())


@contextmanager
def unchanged(arguments: Arguments) -> Iterator[None]:
    """Scope of a pass of all members, which undoes what it does to objects among the arguments.

    Raises:
        NotFoldable: it changed one, as every member would.
    """
    with objects_kept(arguments) as changed:
        yield
    if changed:
        raise NotFoldable(why_changed(changed))


def why_changed(names: list[str]) -> str:
    """Why members are looped whose calls change objects of these classes."""
    return f"their code changes an argument of the call of which there is one for all ({', '.join(names[:3])})"
