"""Passes in which each sample goes to one member only: rows grouped by member, at the cost of one member."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.arguments import Arguments
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.rows import NotFoldable


def grouped(members: Tensor, num_members: int) -> tuple[Tensor, Tensor]:
    """The samples in the order of their members, and where each member's group begins, int64 [B] and [K+1]."""
    counts = torch.bincount(members, minlength=num_members)
    return torch.argsort(members, stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def another_draw(offsets: Tensor, row_members: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and members of a draw that differs from a given one: all rows go to one member."""
    last, total = len(offsets) - 2, len(row_members)
    k = 0 if bool((row_members > 0).any()) else last
    return (torch.arange(last + 2) > k) * total, torch.full_like(row_members, k)


def joined(parts: list[Any], order: Tensor) -> Any:
    """Outputs of parts of the samples, put together in the samples' own order."""
    flat = [pytree.tree_flatten(part) for part in parts]
    inverse = torch.argsort(order)

    def join(column: tuple[Any, ...]) -> Any:
        if any(isinstance(leaf, MemberTensor) for leaf in column):
            raise NotFoldable("an output without batch has no member of its own; use engine='loop'")
        if not isinstance(column[0], Tensor):
            return column[0]
        whole = column[0] if len(column) == 1 else torch.cat(column)
        return whole.index_select(0, inverse.to(whole.device))

    return pytree.tree_unflatten([join(c) for c in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


def run_drawn(
    call: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any], arguments: Arguments, members: Tensor
) -> Any:
    """Run each drawn member on its samples, one member after the other.

    Args:
        call: runs member k on the samples ``index``, int64 [n], whose arguments it is given.
        arguments: of the whole batch.
        members: int64 [B] on the CPU.

    Returns:
        What a member returns for the whole batch.
    """
    if not len(members):
        return call(0, members, *arguments.selected(members).call)
    order, offsets = grouped(members, int(members.max()) + 1)
    parts = [
        call(k, order[start:stop], *arguments.selected(order[start:stop]).call)
        for k, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        if start < stop
    ]
    return joined(parts, order)


def fold_drawn(
    run: Callable[[Tensor, Tensor], Any],
    num_members: int,
    passes: Callable[[Callable[[int, int], Any]], list[Any]],
    members: Tensor,
) -> Any:
    """Run the samples grouped by member through the folded network.

    Args:
        run: a folded pass over the samples ``index``, int64 [n], grouped by ``offsets``, int64 [K+1].
        num_members: K.
        passes: evaluates all B rows, by as many passes over rows ``start`` to ``stop`` as the memory asks for.
        members: int64 [B] on the CPU.

    Returns:
        What a member returns for the whole batch.

    Raises:
        NotFoldable: an output that does not carry the batch.
    """
    order, offsets = grouped(members, num_members)
    return joined(passes(lambda start, stop: run(order[start:stop], offsets.clamp(start, stop) - start)), order)
