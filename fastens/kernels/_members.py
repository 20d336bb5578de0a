"""K members of one shape as flat memory: what every kernel that reduces over members is launched with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastens.kernels._graph import keep

UNROLLED = 16  # members that a kernel holds in registers and takes from a list of pointers


def result_like(scores: list[Tensor], rows: int | None = None) -> Tensor:
    """An uninitialised result in the layout that the native kernels give: as `csrc/cpu/flat.h` decides.

    Args:
        scores: K tensors [B, ...], whose layout decides.
        rows: of the result, where it is of the first of the B alone; none for all.
    """
    first = scores[0]
    sizes, strides = first.shape, first.stride()
    result = first if rows is None else first[:rows]
    expected = 1
    for d in sorted(range(1, first.ndim), key=lambda d: strides[d]):
        if sizes[d] == 1:
            continue
        if strides[d] != expected:
            return result.new_empty(result.shape)
        expected *= sizes[d]
    flat = sizes[0] == 1 or strides[0] == expected
    return torch.empty_like(result) if flat else result.new_empty(result.shape)


def flattened(scores: list[Tensor], like: Tensor) -> list[Tensor]:
    """Return the members in the layout of ``like``, so that a flat index is the same element in each; copies if not."""
    return [x if _same_strides(x, like) else torch.empty_like(like).copy_(x) for x in scores]


def pointers(members: list[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """Return what a kernel reads K members from: K tensors, or beyond UNROLLED the first, and the distance of the next.

    Members of equal distance (a stack that was unbound) are read where they are; a longer list of others is stacked.
    """
    if len(members) <= UNROLLED:
        return tuple(members), 0
    step = _distance(members)
    if step is None:
        first = members[0]
        stack = torch.empty(len(members) * first.numel(), dtype=first.dtype, device=first.device)
        for k, member in enumerate(members):
            flat = stack[k * first.numel() : (k + 1) * first.numel()]
            torch.as_strided(flat, first.shape, first.stride()).copy_(member)
        return (stack,), first.numel()
    return (members[0],), step


def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return these numbers as a tensor on the device, copied there once."""
    return keep(_on_device(values, dtype, device))


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(size == 1 or ours == theirs for size, ours, theirs in zip(a.shape, a.stride(), b.stride(), strict=True))


def _distance(members: list[Tensor]) -> int | None:
    first, second = members[0].data_ptr(), members[1].data_ptr()
    step = second - first
    size = members[0].element_size()
    if step % size or any(x.data_ptr() != first + k * step for k, x in enumerate(members)):
        return None
    return step // size
