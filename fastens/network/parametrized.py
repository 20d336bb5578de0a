"""Parametrized modules of torch, whose weights are properties of a class that each module has for itself.

A copy of such a module has the class of the original. There, torch's property keeps what it computes inside
``parametrize.cached()`` as the original's, so that copies would get each other's weights; it keeps the original alive,
and taking a parametrization off one of them takes it off all. So a copy of a member gets classes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastens.fold.dispatch import Fold, current_fold


def with_own_classes(modules: Iterable[nn.Module]) -> None:
    """Give modules that were copied classes of their own, where they have those of the originals."""
    classes: dict[type, type] = {}
    for module in modules:
        kind = type(module)
        if kind not in classes:
            classes[kind] = _own_class(kind)
        if classes[kind] is not kind:
            module.__class__ = classes[kind]


def any_parametrized(modules: Iterable[nn.Module]) -> bool:
    """Whether a weight among those of the modules is computed when it is read."""
    return any(parametrize.is_parametrized(module) for module in modules)


def caching() -> bool:
    """Whether what parametrizations give is kept, inside ``parametrize.cached()``."""
    return bool(parametrize._cache_enabled)


def forget(modules: Iterable[nn.Module]) -> None:
    """Drop what ``parametrize.cached()`` keeps of networks whose state is put back: it is computed again."""
    own = {id(each) for module in modules for each in module.modules()} if parametrize._cache_enabled else set()
    cache: dict[Any, Any] = parametrize._cache
    for key in [key for key in cache if key[0] in own]:
        cache.pop(key, None)


def is_weight(value: Any) -> bool:
    """Whether an attribute of a class is what computes a parametrized weight, of the name that it has there."""
    return isinstance(value, property) and getattr(value.fget, "__module__", "") in (parametrize.__name__, __name__)


def _own_class(kind: type) -> type:
    """A class that differs in its weights alone, which are the module's that is asked; itself where it has none."""
    names = [name for name, value in vars(kind).items() if is_weight(value)]
    if not names:
        return kind
    taken = {name: x for name, x in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, kind.__bases__, {**taken, **{name: _weight(name) for name in names}})


def _weight(name: str) -> property:
    """What torch gives a class for a parametrized weight, kept as that of the module that is asked."""

    def get_parametrized(self: Any) -> Tensor:
        parametrization = self.parametrizations[name]
        if not parametrize._cache_enabled:
            return parametrization()
        cache: dict[Any, Any] = parametrize._cache
        fold, key = _pass(), (id(self), name)
        found = cache.get(key)
        if found is None or found[0] is not self or found[1] is not fold:
            # The module is kept as well, so that no other one is taken for it. A pass has values of its own.
            found = cache[key] = self, fold, parametrization()
        return found[2]

    def set_original(self: Any, value: Tensor) -> None:
        self.parametrizations[name].right_inverse(value)

    return property(get_parametrized, set_original)


def _pass() -> Fold | None:
    return None if torch.compiler.is_dynamo_compiling() else current_fold()
