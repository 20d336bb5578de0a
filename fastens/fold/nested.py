"""Arguments and results of functions, which hold tensors in lists, tuples and dictionaries."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastens.fold.tensor import MemberTensor

_NESTS = (tuple, list, dict, slice)  # classes side by side: a union of them is slow to ask


def plain(x: Any) -> Any:
    """A common value without its wrapper."""
    return x.stack if type(x) is MemberTensor and x.hidden is None else x


def is_shape(x: Any) -> bool:
    """Whether pytree is to leave it as it is: a ``torch.Size``, which it would make a tuple."""
    return type(x) is torch.Size


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of nested lists, tuples, dictionaries and slices."""
    found: list[Any] = []
    _collect((tree,), found)
    return found


def _collect(items: Iterable[Any], found: list[Any]) -> None:
    for item in items:
        if not isinstance(item, _NESTS):
            found.append(item)
        elif isinstance(item, dict):
            _collect(item.values(), found)
        elif isinstance(item, slice):
            _collect((item.start, item.stop, item.step), found)
        else:
            _collect(item, found)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)([mapped(function, item) for item in tree])
    if isinstance(tree, tuple):  # a named tuple, a size
        return tree if isinstance(tree, torch.Size) else type(tree)(*[mapped(function, item) for item in tree])
    if isinstance(tree, dict):
        return {key: mapped(function, item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*[mapped(function, item) for item in (tree.start, tree.stop, tree.step)])
    return tree


def name_of(func: Any) -> str:
    """What a function is called, an attribute by its own name."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


def first_in_front(kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``f(input=x, dim=1)`` as ``f(x, dim=1)``."""
    first = next((name for name in ("input", "self", "tensor", "tensors") if name in kwargs), None)
    if first is None:
        return (), kwargs
    return (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}


def takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function has parameters for these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
