"""Arguments and results of functions, which hold tensors in lists, tuples and dictionaries."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.tensor import MemberTensor


def plain(x: Any) -> Any:
    """A common value without its wrapper."""
    return x.stack if type(x) is MemberTensor and x.hidden is None else x


def leaves_of(tree: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves_of(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves_of(item)
    else:
        yield tree


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


def contents(value: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any]]:
    """The lists, dictionaries and sets in a value, attributes of objects among them, each with a copy."""
    seen = set() if seen is None else seen
    held = value if type(value) in (list, dict, set) else vars(value) if _is_plain(value) else None
    if held is None or id(held) in seen:
        return
    seen.add(id(held))
    yield held, copy.copy(held)
    for item in held.values() if isinstance(held, dict) else held:
        yield from contents(item, seen)


def _is_plain(value: Any) -> bool:
    """Whether a value is an object of a class of users, whose attributes are state of who holds it."""
    kind = type(value)
    if kind is types.SimpleNamespace:
        return True
    of_a_library = kind.__module__.partition(".")[0] in (*sys.stdlib_module_names, "torch", "numpy", "fastens")
    return hasattr(value, "__dict__") and not of_a_library and not isinstance(value, nn.Module | Tensor | type)
