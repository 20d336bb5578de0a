"""Stand-ins for the stacks while a pass is traced: fake tensors, so that gradients reach the stacks."""

from __future__ import annotations

import contextvars
import itertools
import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastens.fold.attributes import standing_for
from fastens.scopes import scope

if TYPE_CHECKING:
    from fastens.engine.engine import Engine

ENGINES: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_OF_TRACES = (FakeTensor, FunctionalTensor)  # a tuple, which costs less to ask than a union
_NUMBERS = itertools.count()
_STANDING_IN: contextvars.ContextVar[dict[int, Tensor] | None] = contextvars.ContextVar("stacks", default=None)


class Nested(NamedTuple):
    """How tensors and what else a call gives are nested, as :mod:`fastens.engine.engine` returns it."""

    spec: Any
    leaves: tuple[Any, ...]  # of a tensor [K, ...] none, of K tensors of their own K, else the members' K values

    def filled(self, tensors: list[Any]) -> list[Any]:
        """The leaves, with the tensors where they belong, and the structure last."""
        found: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, list):
                found.append(leaf)
            elif leaf is None:
                found.append(tensors.pop(0))
            else:
                found.append([tensors.pop(0) for _ in range(leaf)])
        return [*found, self.spec]


def emptied(leaves: list[Any], spec: Any) -> tuple[tuple[Tensor, ...], Nested]:
    """Return the tensors of leaves, and what puts them back in their places."""
    tensors, kept = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            kept.append(None)
        elif all(isinstance(x, Tensor) for x in leaf):
            tensors.extend(leaf)
            kept.append(len(leaf))
        else:
            kept.append(list(leaf))
    return tuple(tensors), Nested(spec, tuple(kept))


def standing_in(tensor: Tensor) -> Tensor:
    """What a trace has in the place of a stack; the stack itself outside one."""
    found = _STANDING_IN.get()
    return tensor if found is None else found.get(id(tensor), tensor)


def tracing() -> bool:
    """Whether stacks have stand-ins in this context."""
    return _STANDING_IN.get() is not None


def traced(*tensors: Tensor) -> bool:
    """Whether a trace or a transform is in progress, whose tensors are its own: nothing is kept for other passes."""
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None or tracing():
        return True
    for x in tensors:  # noqa: SIM110  (asked for every weight that a member reads, where a generator costs more)
        if isinstance(x, _OF_TRACES):
            return True
    return False


def with_stacks(engine: Engine, given: tuple[Tensor, ...]) -> AbstractContextManager[Any]:
    """Scope of a trace, which has these in the place of the engine's stacks: of parameters they are parameters."""
    for stack, own in zip(engine.tensors, given, strict=True):
        if isinstance(stack, torch.nn.Parameter) and not isinstance(own, torch.nn.Parameter):
            own._is_param = True  # by which torch's class of parameters knows its own
        standing_for(own, stack)
    return scope(_STANDING_IN, {id(t): own for t, own in zip(engine.tensors, given, strict=True)})


def number_of(engine: Engine) -> str:
    """What a compiled graph finds the engine by: a string, which no compiler takes for a size that may change."""
    number = str(next(_NUMBERS))
    ENGINES[number] = engine
    return number
