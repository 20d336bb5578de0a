"""What Python code names: read from its bytecode, without running it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code, and that of the functions, comprehensions and classes inside it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_in(part)


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of globals and attributes that code uses, those that it passes to ``getattr`` among them."""
    parts = list(codes_in(code))
    constants = {x for part in parts for x in part.co_consts if isinstance(x, str) and x.isidentifier()}
    return frozenset(constants.union(*(part.co_names for part in parts)))


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions of an attribute of a class: a method, a class's or a static one, or a property."""
    if isinstance(value, property):
        found = [value.fget, value.fset]
    elif isinstance(value, functools.cached_property):
        found = [value.func]
    else:
        found = [getattr(value, "__func__", value)]
    return [each for each in found if isinstance(each, types.FunctionType)]
