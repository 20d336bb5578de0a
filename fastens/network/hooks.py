"""Forward and backward hooks of a network's modules, which members that are called one by one run as their own."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastens.fold.tensor import modules_of
from fastens.network.alike import HOOK_TABLES


@contextmanager
def hooks_for_all(network: nn.Module) -> Iterator[Callable[[], bool]]:
    """Scope of calls of all members, of whose hooks each takes away its own: yields what to call before each."""
    tables = [table for _, m in modules_of(network) for name in HOOK_TABLES if (table := vars(m)[name])]
    before = [dict(table) for table in tables]

    def whole() -> bool:
        for table, hooks in zip(tables, before, strict=True):
            if table.keys() != hooks.keys():
                gone.extend((table, key) for key in hooks.keys() - table.keys())
                made = {key: hook for key, hook in table.items() if key not in hooks}
                table.clear()
                table.update({**hooks, **made})
        return True

    gone: list[tuple[dict[int, Any], int]] = []
    try:
        yield whole
    finally:
        for table, key in gone:
            table.pop(key, None)


def rebound(hook: Any, own: dict[int, nn.Module]) -> Any:
    """A hook for one member: a method of a module of the network is that of the member's own module."""
    if isinstance(hook, types.MethodType) and id(hook.__self__) in own:
        return types.MethodType(hook.__func__, own[id(hook.__self__)])
    if isinstance(hook, functools.partial):
        function, args = rebound(hook.func, own), [own.get(id(x), x) for x in hook.args]
        keywords = {name: own.get(id(x), x) for name, x in hook.keywords.items()}
        before = (hook.func, *hook.args, *hook.keywords.values())
        if any(a is not b for a, b in zip(before, (function, *args, *keywords.values()), strict=True)):
            return functools.partial(function, *args, **keywords)
    return hook
