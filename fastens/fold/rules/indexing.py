"""Reading and writing parts of a tensor by index."""

from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import plain
from fastens.fold.rules.shape import behind
from fastens.fold.tensor import NotFoldable, member_valued, memory_of


def _basic(index: Any) -> bool:
    return (
        index is None
        or index is Ellipsis
        or (isinstance(index, int | slice | torch.SymInt) and not isinstance(index, bool))
    )


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _tensors(indices: tuple[Any, ...]) -> list[Tensor]:
    """The indices that are tensors, side by side among full or partial slices; none for other forms.

    What they choose then stands where they do, as it does with the hidden dimension in front; it moves to dimension 0
    where something is between them.
    """
    where = [n for n, i in enumerate(indices) if isinstance(i, Tensor)]
    sliced = all(isinstance(i, Tensor | slice) or i is Ellipsis for i in indices)
    together = bool(where) and where[-1] - where[0] == len(where) - 1
    found = [indices[n] for n in where]
    return found if sliced and together and all(i.dtype != torch.uint8 for i in found) else []


@rule(*named("__getitem__"))
def getitem(fold: Fold, func: Any, x: Any, index: Any) -> Any:
    """``x[index]``: slices are views, tensors of numbers are a lookup in each entry."""
    indices = _indices(index)
    if any(isinstance(i, slice) and any(isinstance(e, Tensor) for e in (i.start, i.stop, i.step)) for i in indices):
        return NotImplemented
    if all(map(_basic, indices)):
        _check_bounds(x, indices)
        return fold.wrap(fold.stack(x)[(slice(None), *indices)], fold.aliases(x))
    tensors = _tensors(indices)
    if not tensors:
        return NotImplemented
    if not any(map(member_valued, tensors)):
        own = tuple(plain(i) if isinstance(i, Tensor) else i for i in indices)
        seen = fold.stack(x)[(slice(None), *own)]  # a view where all are numbers
        return fold.wrap(seen, memory_of(seen) != memory_of(fold.stack(x)) or fold.aliases(x))
    numbers: Any = tensors[0]
    if len(indices) > 1 or numbers.dtype == torch.bool:
        return NotImplemented
    chosen = fold.stack(numbers)
    members = torch.arange(len(chosen), device=chosen.device).view(-1, *(1,) * numbers.ndim)
    found = fold.entries(x)[members, chosen]
    if not numbers.ndim:  # by one number a member sees a part
        return fold.copied(found, fold.entries(x))
    return fold.wrap(found)


def _check_bounds(x: Any, indices: tuple[Any, ...]) -> None:
    """Raise the member's own error where it takes more dimensions than there are."""
    if sum(isinstance(i, int | slice) for i in indices) > x.ndim:
        raise IndexError(f"too many indices for tensor of dimension {x.ndim}")


@rule(*named("__setitem__"))
def setitem(fold: Fold, func: Any, x: Any, index: Any, value: Any) -> Any:
    """``x[index] = value``."""
    indices = _indices(index)
    if not all(map(_basic, indices)) and (not _tensors(indices) or any(map(member_valued, indices))):
        return NotImplemented
    own = (slice(None), *(plain(i) if isinstance(i, Tensor) else i for i in indices))
    stack = fold.stack(x)
    if not isinstance(value, Tensor):
        stack[own] = value
        return None
    ndim = stack[own].ndim - 1
    if not member_valued(value):
        stack[own] = plain(value)
        return None
    found = fold.stack(value)
    if found.ndim - 1 > ndim:  # leading dimensions of one
        found = found.reshape(len(found), *value.shape[value.ndim - ndim :])
    stack[own] = found[(slice(None), *(None,) * (ndim + 1 - found.ndim))]
    return None


@rule(
    *named(
        "gather scatter scatter_ scatter_add scatter_add_ take_along_dim",
        "index_add index_add_ index_copy index_copy_ index_fill index_fill_",
    )
)
def scattered(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Reading and writing along a dimension by numbers."""
    name = func.__name__
    for key in ("dim", "index", "indices", "src", "source", "value"):
        if key in kwargs and (key != "dim" or name != "take_along_dim"):
            kwargs = dict(kwargs)
            args = (*args, kwargs.pop(key))
    if name == "take_along_dim":
        index, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim is None:
            return NotImplemented
        return fold.wrap(func(fold.entries(x), fold.entries(index), dim=behind(dim, x.ndim)))
    if kwargs or not args or not isinstance(args[0], int):
        return NotImplemented
    dim, index, *rest = args
    if name.startswith("index_"):
        if not x.ndim or member_valued(index) or any(isinstance(r, Tensor) and r.ndim == 0 for r in rest):
            return NotImplemented
        own = [fold.entries(r) if isinstance(r, Tensor) else r for r in rest]
        target = fold.stack(x) if name.endswith("_") else fold.entries(x)
        found = func(target, behind(dim, x.ndim), plain(index), *own)
    else:
        if x.ndim != index.ndim or not x.ndim:
            return NotImplemented
        own = [fold.entries(r) if isinstance(r, Tensor) else r for r in rest]
        target = fold.stack(x) if name.endswith("_") else fold.entries(x)
        found = func(target, behind(dim, x.ndim), fold.entries(index), *own)
    return x if name.endswith("_") else fold.wrap(found)


@rule(*named("unfold_window"), Tensor.unfold)
def windows(fold: Fold, func: Any, x: Any, dimension: int, size: int, step: int) -> Any:
    """Windows along a dimension, as views."""
    if not x.ndim:
        return NotImplemented
    return fold.wrap(fold.stack(x).unfold(behind(dimension, x.ndim), size, step), fold.aliases(x))


@rule(*named("meshgrid"))
def meshgrid(fold: Fold, func: Any, *tensors: Any, **kwargs: Any) -> Any:
    """Entry by entry."""
    return NotImplemented


def refuse(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Masks select other elements in each member."""
    raise NotFoldable("the shape of a result depends on a member's values")


rule(*named("nonzero argwhere unique unique_consecutive"))(refuse)


@rule(*named("masked_select"))
def masked_select(fold: Fold, func: Any, x: Any, mask: Any) -> Any:
    """Entry by entry, where all members select the same elements."""
    return refuse(fold, func) if member_valued(mask) else NotImplemented
