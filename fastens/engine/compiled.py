"""A pass of all members inside ``torch.compile``: one node, traced through as the physical operations that it does.

Dynamo does not look into the pass. Its tracing runs the pass on fake tensors, the stacks among them, so that gradients
reach the stacks and dynamic shapes stay dynamic; how the outputs are nested comes out of that run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from fastens import reproducible
from fastens.engine.arguments import PerMember
from fastens.fold.stand_ins import Nested

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


def compiled_pass(engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward") -> list[Any]:
    """Run all members inside a trace; return the leaves of their outputs, [K, ...], and the structure last.

    Raises:
        NotReproducible: in deterministic mode, which what a compiler makes of the trace does not keep.
    """
    if reproducible.enabled():
        raise reproducible.NotReproducible(
            f"deterministic: a compiled graph chooses by the batch; {reproducible.REMEDY}"
        )
    from fastens.engine.node import looked_at, node  # as dynamo traces this line, which has been imported then

    looked_at(engine.number, engine.guards.barrier.state)  # and what replaced a stack, or changed a mode, traces anew
    leaves, spec = pytree.tree_flatten((args, kwargs))  # dynamo gives a graph no objects, but what is in them
    own = [i for i, x in enumerate(leaves) if isinstance(x, PerMember)]
    args, kwargs = pytree.tree_unflatten([x.stack if isinstance(x, PerMember) else x for x in leaves], spec)
    tensors = list(node(engine.number, method, args, kwargs, own, engine.tensors))  # pyright: ignore[reportCallIssue]  # torch's stub
    nested = tensors.pop() if isinstance(tensors[-1], Nested) else engine.nested  # of the trace that has just run
    return nested.filled(tensors)


def drawn_pass(
    evaluate: Callable[[tuple[Any, ...], dict[str, Any]], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Evaluate, outside the trace in progress, what draws numbers anew in each call, or asks for values.

    Raises:
        RuntimeError: the trace is an export, which has no outside.
        NotReproducible: likewise, in deterministic mode.
    """
    if torch.compiler.is_exporting() and reproducible.enabled():
        raise reproducible.NotReproducible(f"deterministic: an exported program keeps no bits; {reproducible.REMEDY}")
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "members or dropout masks are drawn anew in each call, which an exported program would repeat, or a method "
            "other than forward is called, of which values tell whether the members agree; export the ensemble itself, "
            "under another rule, ens.with_rule('mean'), or MCDropout with masks='fixed'"
        )
    from fastens.engine.node import untraced  # as dynamo traces this line, which has been imported then

    return untraced(evaluate, args, kwargs)
