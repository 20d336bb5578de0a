"""How rows of a folded batch find their member: uniform groups, or groups given by offsets."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def split_rows(x: Tensor, num_members: int, offsets: Tensor | None) -> list[Tensor]:
    """Cut ``x`` [R, ...] into the K groups of rows that belong to one member each."""
    # One split, because its gradient is one cat; the gradient of a slice is as large as all rows, once per member.
    if offsets is None:
        return list(x.split([x.shape[0] // num_members] * num_members))
    return list(x.split([stop - start for start, stop in pairwise(offsets.tolist())]))


def rows_of(stack: Tensor) -> Tensor:
    """A stack [K, B, ...] as the rows of all its members, [K B, ...]."""
    if torch.compiler.is_exporting() and stack.is_contiguous():
        # there ``min`` is symbolic, and ``flatten`` leaves a stride min(s, B s) that no named batch is proved to fit
        return stack.as_strided((stack.shape[0] * stack.shape[1], *stack.shape[2:]), stack.stride()[1:])
    return stack.flatten(0, 1)


def expand_rows(stack: Tensor, num_rows: int, offsets: Tensor | None) -> Tensor:
    """Give every row its member's entry: ``stack`` [K, ...] -> [R, ...]."""
    num_members = stack.shape[0]
    if offsets is None:
        size = num_rows // num_members
        return stack.unsqueeze(1).expand(num_members, size, *stack.shape[1:]).reshape(-1, *stack.shape[1:])
    counts = offsets.to(stack.device).diff()
    return torch.repeat_interleave(stack, counts, dim=0, output_size=num_rows)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, offsets: Tensor | None) -> Tensor:
    """Scale and shift ``y`` [R, ...] by each row's member: ``weight``, ``bias`` [K, *s] where s begins at ``axis``."""
    if weight is not None:
        y = y * _aligned(expand_rows(weight, y.shape[0], offsets), y, axis)
    return y if bias is None else y + _aligned(expand_rows(bias, y.shape[0], offsets), y, axis)


def modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
    """Scale ``y`` [R, ...] by 1 + ``scale`` and shift it; both are [R, *s] where s begins at ``axis``."""
    if scale is not None:
        y = y * (1 + _aligned(scale, y, axis))
    return y if shift is None else y + _aligned(shift, y, axis)


def _aligned(rows: Tensor, y: Tensor, axis: int) -> Tensor:
    """Bring ``rows`` [R, *s] to the dimensions of ``y``, s beginning at ``axis``."""
    after = y.ndim - axis - (rows.ndim - 1)
    return rows.reshape(rows.shape[0], *(1,) * (axis - 1), *rows.shape[1:], *(1,) * after)


def per_member(
    function: Callable[[Tensor, int], Tensor], x: Tensor, num_members: int, offsets: Tensor | None
) -> Tensor:
    """Apply ``function(rows, k)`` to each member's rows and join the results."""
    if num_members == 1:
        return function(x, 0)
    return torch.cat([function(rows, k) for k, rows in enumerate(split_rows(x, num_members, offsets))])
