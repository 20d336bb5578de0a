"""What Python code names: read from its bytecode, without running it."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

# what has a life of its own, or is no state: attributes of such objects are left alone
_LIBRARIES = frozenset(sys.stdlib_module_names) - {"collections", "types", "argparse"} | {"torch", "numpy", "fastens"}


def of_library(module: Any) -> bool:
    """Whether what a Python module of this name defines is a library's, whose own state nobody changes."""
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


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
    matched = {
        name
        for part in parts
        if _MATCH_CLASS in part.co_code[::2]
        for x in part.co_consts
        if isinstance(x, tuple)
        for name in x
        if isinstance(name, str)
    }
    return frozenset(constants.union(matched, *(part.co_names for part in parts)))


@functools.cache
def globals_in(code: types.CodeType) -> frozenset[str]:
    """The names of globals that code uses, those that it passes to ``globals()`` among them."""
    steps = [step for part in codes_in(code) for step in dis.get_instructions(part)]
    names = frozenset(step.argval for step in steps if step.opname in _LOADS)
    return names_in(code) if "globals" in names else names


@functools.cache
def imports_in(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """What code imports while it runs: how many packages above it, and the name."""
    if all(_IMPORT_NAME not in part.co_code[::2] for part in codes_in(code)):
        return ()
    parts = [list(dis.get_instructions(part)) for part in codes_in(code)]
    return tuple(
        (steps[i - 2].argval, step.argval)  # before the name: the level, and what is taken from the module
        for steps in parts
        for i, step in enumerate(steps)
        if step.opname == "IMPORT_NAME" and isinstance(steps[i - 2].argval, int)
    )


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions of an attribute of a class: a method, whatever it is wrapped in, or a property."""
    kind = type(value)  # others may say that they are of a class that they are not
    if issubclass(kind, property):
        found = [value.fget, value.fset]
    elif issubclass(kind, functools.cached_property):
        found = [value.func]
    elif issubclass(kind, functools.partialmethod):
        return functions_of(value.func)
    elif issubclass(kind, functools.singledispatchmethod):
        return [each for x in (value.func, *value.dispatcher.registry.values()) for each in functions_of(x)]
    else:
        found = [value.__func__ if issubclass(kind, _WITH_FUNCTION) else value]
    return [each for each in found if type(each) is types.FunctionType]


_WITH_FUNCTION = staticmethod, classmethod, types.MethodType
_LOADS = "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"
_IMPORT_NAME, _MATCH_CLASS = dis.opmap["IMPORT_NAME"], dis.opmap["MATCH_CLASS"]
