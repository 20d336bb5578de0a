"""Copies of tensors that are laid out as these are, and share memory where these do, or do not."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

_PLAIN = int | float | str | torch.dtype | torch.device | torch.Size | None


def is_plain(x: Any) -> bool:
    """Whether a leaf is a number, a name or the like, or a tensor whose elements are where its strides say.

    A number of a class of the user's may have attributes, which no key tells; those of an enumeration are of its name.
    """
    if not isinstance(x, Tensor):
        return isinstance(x, _PLAIN) and (isinstance(x, enum.Enum) or not hasattr(x, "__dict__"))
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and not (x._is_zerotensor() or x.is_conj() or x.is_neg())
    )


def check_shapes(leaves: list[Any]) -> None:
    """Raise TypeError where a leaf is a nested tensor of the layout that has no shape."""
    for x in leaves:
        if isinstance(x, Tensor) and x.is_nested and x.layout is torch.strided:
            raise TypeError("a nested tensor of torch.strided has no shape: make it with layout=torch.jagged")


def duplicate(x: Tensor, factor: float = 1.0) -> Tensor:
    """A copy that is laid out as a tensor is, in memory of its own; of one of floating point times a factor."""
    dims = sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)
    apart = x.numel() and all(outer >= s * n for (s, n), (outer, _) in itertools.pairwise([(1, 1), *dims]))
    if apart:
        made = flat = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    else:  # elements share memory
        flat = x.as_strided((_span(x),), (1,), x.storage_offset()).clone()
        made = flat.as_strided(x.shape, x.stride())
    if factor != 1.0 and x.is_floating_point():
        flat.mul_(factor)
    return made


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that are laid out as the tensors are, and share memory where these do.

    Tensors that are differentiated share it only where they are views of one, as far as torch knows.
    """
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return [x.clone() for x in tensors]
    groups: dict[int, list[Tensor]] = {}
    for x in tensors:
        if is_plain(x):
            groups.setdefault(x.untyped_storage()._cdata, []).append(x)
    wholes = {storage: _whole(group) for storage, group in groups.items() if len(group) > 1}

    def copied(x: Tensor) -> Tensor:
        if not is_plain(x):
            return x.clone()
        whole = wholes.get(x.untyped_storage()._cdata)
        return duplicate(x) if whole is None else whole(x)

    return [copied(x) for x in tensors]


def _whole(group: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Copy the memory that tensors share; return what makes a tensor's copy of it."""
    first = group[0]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in group)):
        spans = [(_offset(x) * x.element_size(), _span(x) * x.element_size()) for x in group]
        start = min(offset for offset, _ in spans) // 16 * 16
        stop = max(offset + size for offset, size in spans)
        memory = torch.empty(0, dtype=torch.uint8, device=first.device)
        memory = memory.set_(first.untyped_storage(), start, (stop - start,), (1,)).clone().untyped_storage()

        def part(x: Tensor) -> Tensor:
            offset = _offset(x) - start // x.element_size()
            return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, offset, x.shape, x.stride())

        return part
    roots = {id(root): root for x in group for root in (x if x._base is None else x._base,)}
    if len(roots) > 1:
        return duplicate
    (root,) = roots.values()
    own, start = duplicate(root), root.storage_offset()
    return lambda x: own if x is root else own.as_strided(x.shape, x.stride(), x.storage_offset() - start)


def _offset(x: Tensor) -> int:
    """Where it begins in its memory, in elements; of none whose sizes are symbols."""
    return cast(int, x.storage_offset())


def _span(x: Tensor) -> int:
    """How many elements of its memory a tensor reaches over."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
