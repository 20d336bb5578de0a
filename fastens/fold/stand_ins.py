"""Stand-ins for the stacks while a pass is traced: fake tensors, so that gradients reach the stacks."""

from __future__ import annotations

import contextvars
import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastens.fold.arguments import Arguments

if TYPE_CHECKING:
    from fastens.fold.engine import FoldEngine

_ENGINES: weakref.WeakValueDictionary[int, FoldEngine] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_STANDING_IN: contextvars.ContextVar[dict[int, Tensor] | None] = contextvars.ContextVar("stacks", default=None)


@dataclasses.dataclass
class Traced:
    """How the outputs of a traced pass are nested: their structure, and the leaves that are no tensors, else none."""

    spec: Any
    values: tuple[Any, ...]


def standing_in(tensor: Tensor) -> Tensor:
    """What a trace has in the place of a stack; the stack itself outside one."""
    found = _STANDING_IN.get()
    return tensor if found is None else found.get(id(tensor), tensor)


def tracing() -> bool:
    """Whether stacks have stand-ins in this context."""
    return _STANDING_IN.get() is not None


def traced(tensors: Iterable[Tensor]) -> bool:
    """Whether a trace or a transform is in progress, whose tensors are its own: nothing is kept for other passes."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.compiler.is_compiling() or transformed or tracing() or any(isinstance(x, FakeTensor) for x in tensors)


@contextmanager
def _with_stacks(engine: FoldEngine, given: tuple[Tensor, ...]) -> Iterator[None]:
    token = _STANDING_IN.set({id(t): own for t, own in zip(engine.tensors, given, strict=True)})
    try:
        yield
    finally:
        _STANDING_IN.reset(token)


def number_of(engine: FoldEngine) -> int:
    """A number by which a compiled graph finds the engine."""
    number = next(_NUMBERS)
    _ENGINES[number] = engine
    return number


def evaluate_node(number: int, method: str, args: Any, kwargs: Any, stacks: Any) -> tuple[Tensor, ...]:
    """The tensors that a pass of an engine's members gives, where a trace has these stand-ins for its stacks."""
    engine = _ENGINES[number]
    arguments = Arguments(tuple(args), dict(kwargs), engine.num_members)
    with _with_stacks(engine, tuple(stacks)):
        *leaves, spec = engine.fold(arguments, None, method)
    traced = Traced(spec, tuple(None if isinstance(x, Tensor) else x[0] for x in leaves))
    if engine.traced != traced:
        engine.traced = traced
    return tuple(x for x in leaves if isinstance(x, Tensor))
