"""Samples and their members: sorted by member, back in their own order, and taken from members on the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.engine.arguments import Arguments
from fastens.engine.leaves import alike, columns_of


def grouped(members: Tensor, num_members: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the order that sorts samples by member, int64 [B] (none where they are sorted), and the members in it.

    Third, where each member's group begins, int64 [K+1].
    """
    order = None
    if torch.compiler.is_compiling() or not _rises(members.tolist()):
        order = torch.argsort(members, stable=True)
        members = members.index_select(0, order)
    return order, members, torch.searchsorted(members, torch.arange(num_members + 1))


def _rises(numbers: list[int]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(numbers))


def reordered(output: Any, order: Tensor | None) -> Any:
    """Return a copy of an output, its rows back in the samples' own order."""
    inverse = None if order is None else torch.argsort(order)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.clone() if inverse is None else leaf.index_select(0, inverse.to(leaf.device))

    return pytree.tree_map(one, output)


def run_drawn(call: Callable[[int, Arguments], Any], arguments: Arguments, members: Tensor) -> Any:
    """Evaluate the drawn members on the whole batch, one after the other, and take each sample from its own.

    Right for any member whose outputs carry the samples in dimension 0, also where it mixes them.

    Args:
        call: runs member k on arguments.
        arguments: of the whole batch.
        members: int64 [B] on the CPU.

    Raises:
        ValueError: an output does not carry the samples.
        TypeError: members return different values or structures.
    """
    drawn = sorted(set(members.tolist())) or [0]
    outputs = [pytree.tree_flatten(call(k, arguments)) for k in drawn]
    place = {k: i for i, k in enumerate(drawn)}
    which = torch.tensor([place[k] for k in members.tolist()], dtype=torch.int64)

    def join(column: list[Any]) -> Any:
        first = column[0]
        if not isinstance(first, Tensor):
            return alike(column)
        if first.ndim == 0 or first.shape[0] != len(members):
            raise ValueError(
                f"a rule that draws one member per sample needs outputs with the {len(members)} samples in dimension "
                f"0, got {list(first.shape)}"
            )
        rows = torch.arange(len(members), device=first.device)
        return torch.stack(column)[which.to(first.device), rows]

    *leaves, spec = columns_of(outputs)
    return pytree.tree_unflatten([join(column) for column in leaves], spec)
