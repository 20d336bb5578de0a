"""A pass of all members inside ``torch.compile``: one node, traced through as the physical operations that it does.

Dynamo does not look into the pass. Its tracing runs the pass on fake tensors, the stacks among them, so that gradients
reach the stacks and dynamic shapes stay dynamic; how the outputs are nested comes out of that run.
"""

from __future__ import annotations

import contextvars
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastens import reproducible
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


def compiled_pass(
    engine: FoldEngine, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
) -> list[Any]:
    """Run all members inside a trace; return the leaves of their outputs, [K, ...], and the structure last.

    Raises:
        NotReproducible: in deterministic mode, which what a compiler makes of the trace does not keep.
    """
    if reproducible.enabled():
        raise reproducible.NotReproducible(
            f"deterministic: a compiled graph chooses by the batch; {reproducible.REMEDY}"
        )
    from fastens.fold.node import node  # as dynamo traces this line, which has been imported then

    tensors = list(node(engine.number, method, args, kwargs, engine.tensors))
    traced = engine.traced  # of the trace that has just run
    leaves = []
    for value in traced.values:
        leaves.append(tensors.pop(0) if value is None and tensors else [value] * engine.num_members)
    return [*leaves, traced.spec]


def drawn_pass(
    evaluate: Callable[[tuple[Any, ...], dict[str, Any]], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Evaluate, outside the trace in progress, what draws numbers anew in each call.

    Raises:
        RuntimeError: the trace is an export, which has no outside.
        NotReproducible: likewise, in deterministic mode.
    """
    if torch.compiler.is_exporting() and reproducible.enabled():
        raise reproducible.NotReproducible(f"deterministic: an exported program keeps no bits; {reproducible.REMEDY}")
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "members or dropout masks are drawn anew in each call, which an exported program would repeat; export the "
            "ensemble under another rule, ens.with_rule('mean'), or MCDropout with masks='fixed'"
        )
    from fastens.fold.node import untraced  # as dynamo traces this line, which has been imported then

    return untraced(evaluate, args, kwargs)
