"""What containers hold, by the methods of the built-in class that they are of, whatever a subclass makes of these."""

from __future__ import annotations

import itertools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any


def keys_and_values(held: dict[Any, Any]) -> Iterable[Any]:
    """All keys of a dictionary, then all values."""
    return itertools.chain(dict.keys(held), dict.values(held))


LOOKS: dict[type, tuple[Callable[[Any], Iterable[Any]], ...]] = {
    list: (list.__iter__,),
    set: (set.__iter__,),
    tuple: (tuple.__iter__,),
    frozenset: (frozenset.__iter__,),
    deque: (deque.__iter__,),
    OrderedDict: (OrderedDict.keys, dict.values),  # the order of the first is that of the dictionary
    dict: (keys_and_values,),
    types.MappingProxyType: (types.MappingProxyType.keys, types.MappingProxyType.values),
}


def container_of(kind: type) -> type | None:
    """The built-in container that a class is or derives from."""
    return next((base for base in kind.__mro__ if base in LOOKS), None)


def items_in(value: Any) -> list[Any]:
    """The items of a sequence or of a set, the keys and then the values of a mapping, and none of anything else."""
    container = container_of(type(value))
    return [] if container is None else [item for look in LOOKS[container] for item in look(value)]


def pairs_in(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """The keys of a dictionary, in its order, with what it holds for each."""
    keys = OrderedDict.keys(value) if isinstance(value, OrderedDict) else dict.keys(value)
    return [(key, dict.__getitem__(value, key)) for key in keys]
