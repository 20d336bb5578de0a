"""What dynamo calls as it is: functions of a module of their own, since marking them imports ``torch._dynamo``."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fastens.engine.arguments import Arguments
from fastens.fold.stand_ins import ENGINES, emptied, traced, with_stacks
from fastens.fold.tensor import NotFoldable


@torch.compiler.assume_constant_result  # of these arguments: dynamo calls it once for each state
def looked_at(number: str, state: str) -> bool:
    """Let an engine list its stacks as they are now, in the state that a trace is of; true."""
    assert state == ENGINES[number].guards.barrier.state
    with unset_fake_temporarily():
        ENGINES[number].look()
    return True


@torch.compiler.allow_in_graph
@torch.compiler.disable  # where it is called outside a graph, what it calls is compiled no more
def node(number: str, method: str, args: Any, kwargs: Any, stacks: Any) -> tuple[Any, ...]:
    """The tensors that a call of an engine's members gives, where a trace has these stand-ins for its stacks.

    Run outside a trace, as where the graph was parted here, it is an ordinary call, and its structure comes last.

    Raises:
        NotImplementedError: no graph holds what the members do; dynamo parts the graph here.
    """
    engine = ENGINES[number]
    arguments = Arguments(tuple(args), dict(kwargs), engine.num_members)
    if not traced(*arguments.tensors, *stacks):
        *leaves, spec = engine.evaluate(arguments, engine.network.training, method)
        tensors, nested = emptied(leaves, spec)
        return *tensors, nested
    with unset_fake_temporarily():
        _ = engine.behaviour.looped and engine.views  # made here, no tensors of theirs are fakes
    try:
        with with_stacks(engine, tuple(stacks)):
            *leaves, spec = engine.evaluate_at_once(arguments, False, method)
    except (NotFoldable, GuardOnDataDependentSymNode) as error:
        raise NotImplementedError(f"fastens: {error}") from error
    tensors, nested = emptied(leaves, spec)
    if engine.nested != nested:
        engine.nested = nested
    return tensors


_WHY = (
    "members or dropout masks are drawn anew in each call, which a graph would repeat; members are assigned to rows, "
    "which a graph cannot see; a method other than forward asks by values whether members agree; or deterministic mode "
    "is on, which a compiler does not keep"
)


@torch.compiler.disable(reason=_WHY)
def untraced(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function outside the graph: torch.compile parts the graph there, or refuses under ``fullgraph=True``."""
    return function(args, kwargs)
