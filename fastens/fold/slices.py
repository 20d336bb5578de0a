"""Functions that have no rule: run once for each entry of the hidden dimension, which is right for any function."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.nested import leaves_of, mapped, name_of, plain
from fastens.fold.tensor import NotFoldable, ReadsValues, member_valued, memory_of
from fastens.fold.writes import check_written, writes_to, written_by

if TYPE_CHECKING:
    from fastens.fold.dispatch import Fold


def of_one(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function that reads, or writes to its first argument, on the only entry: it is as good as common."""
    own, named = mapped(lambda x: fold.stack(x)[0] if member_valued(x) else plain(x), (args, kwargs))
    result = func(*own, **named)
    return args[0] if writes_to(func, args, kwargs) else result


def entry_by_entry(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function once for each entry of the hidden dimension and stack the results: right for any function."""
    name = name_of(func)
    fold.slices[name] += 1
    for x in written_by(func, args, kwargs):
        check_written(fold, x)
        if member_valued(x) and not fold.aliases(x):
            raise NotFoldable(f"{name} writes to a view that had to be copied")
    columns: dict[int, Any] = {}
    shapes: dict[int, torch.Size] = {}
    writes = writes_to(func, args, kwargs)
    targets = {id(x): x for x in leaves_of(args[0]) if member_valued(x)} if writes else {}

    def entries(x: Tensor) -> Any:
        if member_valued(x) and id(x) not in columns:
            shapes[id(x)] = x.shape
            # of which torch differentiates none that was written to
            parts = [with_usual_strides(part) for part in fold.stack(x).unbind(0)]
            columns[id(x)] = [part.clone() for part in parts] if id(x) in targets else parts
        return x

    mapped(entries, (args, kwargs))
    common = [plain(x) for x in leaves_of((args, kwargs)) if isinstance(x, Tensor) and id(x) not in columns]
    shared = [(x, x._version) for x in common if not x.is_inference()]
    results = []
    for n in range(fold.hidden.size):
        own_args, own_kwargs = mapped(
            lambda x, n=n: columns[id(x)][n] if id(x) in columns else plain(x), (args, kwargs)
        )
        results.append(func(*own_args, **own_kwargs))
    if not results:
        raise NotFoldable(f"{name} of no rows")
    if any(x._version != version for x, version in shared):
        raise NotFoldable(f"{name} writes to a tensor that is the same for all members")
    if any(part.shape != shapes[key] for key, parts in columns.items() for part in parts):
        raise NotFoldable(f"{name} changes the shape of what it is given")
    if writes:
        if isinstance(results[0], Tensor) and results[0].shape != args[0].shape:
            raise NotFoldable(f"{name} changes the shape of what it writes to")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not _initialises(func)):
            for key, target in targets.items():
                fold.stack(target).copy_(torch.stack(columns[key]))
        return args[0] if isinstance(results[0], Tensor) else None
    storages = set(map(memory_of, (*common, *(x[0] for x in columns.values())))) - {None}
    return stacked(fold, results, name, storages)


def stacked(fold: Fold, results: list[Any], name: str, storages: Set[int | None] = frozenset()) -> Any:
    """The results of one function for every entry as one: tensors stacked, anything else alike.

    Raises:
        NotFoldable: they are of different shapes, or differ otherwise.
    """
    flat = [pytree.tree_flatten(result) for result in results]
    if any(spec != flat[0][1] for _, spec in flat):
        raise NotFoldable(f"{name} gives members results of different structure")
    joined = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        first = column[0]
        if isinstance(first, Tensor):
            _expect_usual_strides(column)
            if any(x.shape != first.shape or x.dtype != first.dtype for x in column):
                raise NotFoldable(f"{name} gives members tensors of different shapes")
            made = torch.stack(column)
            joined.append(fold.copied(made, first) if memory_of(first) in storages else fold.wrap(made))
        else:
            if any(type(x) is not type(first) or x != first for x in column):
                raise ReadsValues(f"{name} gives members different values")
            joined.append(first)
    return pytree.tree_unflatten(joined, flat[0][1])


def with_usual_strides(x: Tensor) -> Tensor:
    """An image whose strides in dimensions of size 1 are those of a tensor by itself: a part of a stack may have any.

    Torch's derivative of a batch norm, and its antialiased interpolation, take the memory format from them.
    """
    if x.ndim not in _FORMATS or 1 not in x.shape or x.layout is not torch.strided or x.is_meta:
        return x
    own = next((f for f in (torch.contiguous_format, _FORMATS[x.ndim]) if x.is_contiguous(memory_format=f)), None)
    if own is None:
        return x
    order = [*range(x.ndim)] if own is torch.contiguous_format else [0, *range(2, x.ndim), 1]
    usual, step = dict[int, int](), 1
    for dim in reversed(order):
        usual[dim] = step
        step *= x.shape[dim]
    return x if all(x.stride(dim) == step for dim, step in usual.items()) else x.clone(memory_format=own)


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _expect_usual_strides(results: Iterable[Tensor]) -> None:
    """Let the gradients of results that are stacked have such strides, which those of a stack's parts have not."""
    for x in results:
        if x.requires_grad and x.grad_fn is not None and x.ndim in _FORMATS and 1 in x.shape:
            x.register_hook(with_usual_strides)


def _initialises(func: Any) -> bool:
    """Whether a function initialises weights, which none of torch's differentiates."""
    return getattr(func, "__module__", "") == torch.nn.init.__name__
