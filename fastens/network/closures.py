"""Closures: what functions hold in them, and whether they write to it."""

from __future__ import annotations

import dis
import functools
import types
from typing import Any

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
