"""Calls inside transforms, forward-mode differentiation, function modes and ``cached()``: members' code, one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastens.fold.tensor import NotFoldable
from fastens.network.parametrized import forget
from fastens.network.state import NetworkState

if TYPE_CHECKING:
    from fastens.engine.arguments import Arguments
    from fastens.engine.engine import Engine

Result = TypeVar("Result")


def in_transform(engine: Engine, run: Callable[[Any], Result]) -> Result:
    """Return what a loop over members gives; members that write to themselves in it stay looped afterwards.

    Args:
        engine: that folds otherwise.
        run: the loop, of what calls a member: by its number, arguments and method.
    """

    def call(k: int, arguments: Arguments, method: str = "forward") -> Any:
        return engine.call_module(engine.view(k), k, arguments, method)

    if not engine.behaviour.writes_itself:
        modules = (engine.network, *engine.views)
        with temporarily_clear_interpreter_stack():  # what is kept is of no transform, which lets nothing be put back
            states = [NetworkState(module) for module in modules]
        changed: set[str] = set()
        try:
            result = run(call)
        finally:
            with temporarily_clear_interpreter_stack():
                changed.update(*(state.put_back() for state in states))
        if not changed:
            return result
        forget(modules)
    with temporarily_clear_interpreter_stack():  # what members are given of their own outlives the transform
        engine.give_up("members that write to themselves were called in a transform, a mode or parametrize.cached()")
    return run(functools.partial(engine.call_member, remembers=True))


def in_trace(engine: Engine, arguments: Arguments, method: str = "forward") -> list[Any]:
    """Evaluate all members for a graph, which would not repeat what members write to themselves, in-place writes apart.

    Raises:
        NotFoldable: they write to themselves, which is undone, or have no one answer.
    """
    loops = engine.behaviour.looped
    states = [NetworkState(each) for each in (engine.views if loops else [engine.network])]
    changed: set[str] = set()
    try:
        if loops:
            return engine.loop(arguments, method, lambda k, x, name: engine.call_module(engine.view(k), k, x, name))
        return engine.fold(arguments, None, method)
    finally:
        changed.update(*(state.put_back() for state in states))
        if changed:
            raise NotFoldable(
                f"the network writes to itself ({', '.join(sorted(changed)[:3])}), which a graph would not; where "
                "it keeps what it needs later, call the ensemble once before"
            )
