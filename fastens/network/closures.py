"""Closures: what functions of a member reach and write to, which a copy of the member shares with it."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.containers import items_in, pairs_in
from fastens.network.snapshots import can_change

IN_PLACE = {
    "add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem", "popleft",
    "remove", "reverse", "rotate", "setdefault", "sort", "update",
}  # fmt: skip


def writes_to_closure(function: types.FunctionType) -> bool:
    """Whether a function's code assigns to a variable of its closure, or may change what is there in place."""
    if not function.__closure__:
        return False
    assigns, changes = _writes(function.__code__)
    return assigns or (changes and any(can_change(content_of(cell)) for cell in function.__closure__))


@functools.cache
def _writes(code: types.CodeType) -> tuple[bool, bool]:
    """Whether code and functions inside it assign to variables of the closure; and change things in place."""
    steps = list(dis.get_instructions(code))
    names = set(code.co_freevars)
    assigns = any(step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in names for step in steps)
    changes = any(step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR") for step in steps)
    inside = [_writes(part) for part in code.co_consts if isinstance(part, types.CodeType) and part.co_freevars]
    return (
        assigns or any(each for each, _ in inside),
        changes or bool(IN_PLACE & set(code.co_names)) or any(each for _, each in inside),
    )


def content_of(cell: types.CellType) -> Any:
    """What a cell holds, none where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def reaches_back(member: nn.Module, skipped: Collection[str] = ()) -> str | None:
    """A function of a member that reaches a module, a tensor or a hook by a closure, which a copy would share.

    Args:
        member: whose functions are looked at.
        skipped: names of attributes that are not.

    Returns:
        The name of the function, none where a copy of the member is on its own.
    """
    modules = modules_of(member)
    own = {id(m) for _, m in modules} | {id(t) for t in tensors_of(member).values()}
    own |= {id(table) for _, m in modules for name, table in vars(m).items() if "_hooks" in name}
    seen: set[int] = set()
    for path, module in modules:
        for name, value in _reachable(module):
            for function in () if name in skipped else _functions_in(value, seen):
                if any(_holds(cell, own) for cell in (*(function.__closure__ or ()), *_defaults(function))):
                    return f"{f'{path}.' if path else ''}{name}"
    return None


def _reachable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in TABLES:
            yield name, value
    for kind in type(module).__mro__:
        if "<locals>" in kind.__qualname__:
            yield from ((name, value) for name, value in vars(kind).items())


def _functions_in(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions that a value is made of."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        yield value
        for cell in value.__closure__ or ():
            yield from _functions_in(content_of(cell), seen)
    elif isinstance(value, types.MethodType | staticmethod | classmethod):
        yield from _functions_in(value.__func__, seen)
    elif isinstance(value, functools.partial):
        yield from _functions_in(value.func, seen)
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _functions_in(part, seen)
    elif isinstance(value, dict):
        for _, item in pairs_in(value):
            yield from _functions_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in items_in(value):
            yield from _functions_in(item, seen)


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _holds(value: Any, own: set[int], depth: int = 4) -> bool:
    """Whether a value is, or has among its items, a module or tensor of the member, or the handle of a hook."""
    value = content_of(value) if isinstance(value, types.CellType) else value
    if id(value) in own or (isinstance(value, RemovableHandle) and id(value.hooks_dict_ref()) in own):
        return True
    if not depth:
        return False
    if isinstance(value, dict):
        return any(_holds(item, own, depth - 1) for _, item in pairs_in(value))
    if isinstance(value, list | tuple | set):
        return any(_holds(item, own, depth - 1) for item in items_in(value))
    if isinstance(value, types.MethodType):
        return _holds(value.__self__, own, depth - 1)
    if isinstance(value, functools.partial):
        return any(_holds(item, own, depth - 1) for item in (*value.args, *value.keywords.values()))
    if isinstance(value, type | types.ModuleType | types.FunctionType):
        return False
    kept = getattr(value, "__dict__", None)  # hooks keep in a record what they call
    return isinstance(kept, dict) and _holds(kept, own, depth)
