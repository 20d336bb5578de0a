"""What dynamo calls as it is: functions of a module of their own, since marking them imports ``torch._dynamo``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fastens.engine.arguments import Arguments
from fastens.engine.as_traced import as_traced
from fastens.fold.stand_ins import ENGINES, Nested, emptied, traced, with_stacks
from fastens.fold.tensor import NotFoldable
from fastens.network.snapshots import held_tensors, member_values


@torch.compiler.assume_constant_result  # of these arguments: dynamo calls it once for each state
def looked_at(number: str, state: str) -> bool:
    """Let an engine list its stacks as they are now, in the state that a trace is of; true."""
    assert state == ENGINES[number].guards.barrier.state
    with unset_fake_temporarily():
        ENGINES[number].look()
    return True


@torch.compiler.allow_in_graph
@torch.compiler.disable  # where it is called outside a graph, what it calls is compiled no more
def node(number: str, method: str, args: Any, kwargs: Any, own: Any, stacks: Any) -> tuple[Any, ...]:
    """The tensors that a call of an engine's members gives, where a trace has these stand-ins for its stacks.

    Run outside a trace, as where the graph was parted here, it is an ordinary call, and its structure comes last.

    Args:
        number: of the engine.
        method: what is called.
        args: positional arguments.
        kwargs: keyword arguments.
        own: positions of those leaves that are stacks of what each member has its own of.
        stacks: stand-ins for the engine's.

    Raises:
        NotImplementedError: no graph holds what the members do; dynamo parts the graph here.
    """
    engine = ENGINES[number]
    arguments = Arguments(tuple(args), dict(kwargs)).of_members(own, engine.num_members)
    if not traced(*arguments.tensors, *stacks):
        tensors, nested = _at_once(*engine.evaluate(arguments, engine.network.training, method))
        return *tensors, nested
    with unset_fake_temporarily():
        _ = engine.behaviour.looped and engine.views  # made here, no tensors of theirs are fakes
    try:
        with _compiling(), with_stacks(engine, tuple(stacks)):
            tensors, nested = _at_once(*engine.evaluate_at_once(arguments, False, method))
    except (NotFoldable, GuardOnDataDependentSymNode) as error:
        raise NotImplementedError(f"fastens: {error}") from error
    except AssertionError as error:  # of torch's, of tensors that are no fakes
        modules = engine.views if engine.behaviour.looped else [engine.network]
        if not any(held_tensors(each) or member_values(each) for each in modules):
            raise
        raise NotImplementedError("fastens: members keep tensors in attributes, which no graph has") from error
    if engine.nested != nested:
        engine.nested = nested
    return as_traced(tensors, number)


@contextmanager
def _compiling() -> Iterator[None]:
    """Scope in which ``torch.compiler.is_compiling()``, as torch after 2.11 has it while dynamo calls a node."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _at_once(*columns: Any) -> tuple[tuple[Tensor, ...], Nested]:
    """The tensors of leaves, and how they are nested, which is the same of members one by one.

    A graph that is run as it was traced calls :func:`node` again, and members may have become looped by then.
    """
    *leaves, spec = columns
    return emptied([_stacked(leaf) for leaf in leaves], spec)


def _stacked(leaf: Any) -> Any:
    """K tensors as one, where they are alike in shape and dtype."""
    if isinstance(leaf, Tensor) or not all(isinstance(x, Tensor) for x in leaf):
        return leaf
    first = leaf[0]
    alike = all((x.shape, x.dtype, x.device) == (first.shape, first.dtype, first.device) for x in leaf)
    return torch.stack(list(leaf)) if alike else leaf


_WHY = (
    "members or dropout masks are drawn anew in each call, which a graph would repeat; members are assigned to rows, "
    "which a graph cannot see; a method other than forward asks by values whether members agree; or deterministic mode "
    "is on, which a compiler does not keep"
)


@torch.compiler.disable(reason=_WHY)
def untraced(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function outside the graph: torch.compile parts the graph there, or refuses under ``fullgraph=True``."""
    return function(args, kwargs)
