"""Deterministic mode: each row's result is that of the row by itself, to the bit.

A row by itself is answered by its plan, where that consists of steps and of operations that are exact element by
element; else by torch, one member after the other, so that its bits do not depend on the other members either, on one
thread and on tensors that begin where a cache line does, since the products of MKL depend on addresses too. Rows that
come together are answered by a plan of as many rows where that gave the rows' own bits when it was made, and else one
by one. So whatever torch, Python or a plan does differently for another batch is found, and not relied on.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import reproducible
from fastens.engine.answers import note
from fastens.engine.arguments import Arguments
from fastens.engine.calls import PlannedCall
from fastens.engine.eager import eagerly, replicas_for
from fastens.engine.guards import transformed
from fastens.engine.leaves import alike, columns_of, joined
from fastens.engine.rows import RowsOfMembers
from fastens.engine.states import Behaviour
from fastens.reproducible import REMEDY, NotReproducible
from fastens.trace.functionalize import contiguous

if TYPE_CHECKING:
    from fastens.engine.drawn import DrawnCall
    from fastens.engine.engine import Engine

Result = TypeVar("Result")
_OTHER_BITS = "rows by themselves have other bits than in this plan"


def evaluate(engine: Engine, arguments: Arguments, training: bool, method: str) -> list[Any]:
    """What :meth:`Engine.evaluate` returns, row by row or to the same bits.

    Raises:
        NotReproducible: the rows are mixed, or the network writes to itself or draws random numbers; in a transform.
    """
    planned = _as_plan(engine, arguments if arguments.batch_size > 1 else _laid_out(arguments), method)
    found = None if planned is None else planned.run()
    if found is not None:
        note(engine, planned, True)
        return found
    with engine.turn():
        return _by_rows(engine, planned, arguments, training, method)


def _by_rows(
    engine: Engine, planned: PlannedCall | None, arguments: Arguments, training: bool, method: str
) -> list[Any]:
    rows = rows_of(engine, arguments, method)
    if not rows:
        return engine.evaluate_at_once(arguments, training, method)
    own = _own_rows(engine, arguments, rows, engine.num_members, method)
    found = joined([_evaluate_row(engine, row, each, training, method) for row, each in zip(rows, own, strict=True)], 1)
    if len(rows) == 1:
        return found
    if planned is not None and not planned.refused:
        *leaves, _ = found
        expected = [[x[k] for x in leaves if isinstance(x[k], Tensor)] for k in range(engine.num_members)]
        ours = [x if isinstance(x, Tensor) else torch.stack(x) for x in leaves if isinstance(x[0], Tensor)]
        planned.make(expected, lambda made: differs([x for x in made[:-1] if isinstance(x, Tensor)], ours))
    return found


def _as_plan(engine: Engine, arguments: Arguments, method: str) -> PlannedCall | None:
    if transformed():
        raise NotReproducible(f"deterministic: inside a transform of torch.func rows are not seen; {REMEDY}")
    plannable = method == "forward" and not engine.behaviour.looped and engine.can_plan(arguments)
    return PlannedCall(engine, arguments) if plannable else None


def _evaluate_row(
    engine: Engine, row: Arguments, of_members: list[Arguments], training: bool, method: str
) -> list[Any]:
    def of_member(k: int, _: Any, method: str) -> Any:
        return engine.call_member(k, of_members[k], method)

    once = functools.partial(engine.evaluate_at_once, row, training, method)
    by_members = functools.partial(engine.loop, row, method, of_member)
    return _by_plan_or_torch(engine, once, lambda: _as_plan(engine, row, method), by_members)


def through_members(engine: Engine, arguments: Arguments, members: Sequence[int]) -> list[Any]:
    """Return what some members give by torch, where gradients are asked for, as :func:`evaluate` returns it.

    Raises:
        NotReproducible: likewise.
    """
    found = []
    with engine.turn():
        for row in _own_rows(engine, arguments, rows_of(engine, arguments, "forward"), len(members), "forward"):
            calls = list(zip(members, row, strict=True))
            found.append(eagerly(engine, lambda calls=calls: _outputs(engine, calls)))
    return joined(found, 1)


def _outputs(engine: Engine, calls: Sequence[tuple[int, Arguments]]) -> list[Any]:
    return columns_of([pytree.tree_flatten(engine.call_member(k, arguments)) for k, arguments in calls])


def _own_rows(
    engine: Any, arguments: Arguments, rows: list[Arguments], count: int, method: str
) -> list[list[Arguments]]:
    """For each row the call of each member, on replicas where gradients are asked for.

    Torch would sum in its own order.
    """
    common = [(x, i not in arguments.own) for i, x in enumerate(arguments.leaves) if isinstance(x, Tensor)]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x, _ in common):
        return [[row] * count for row in rows]
    parts = [replicas_for(x, count) if x.requires_grad and deals else [x] * count for x, deals in common]
    given = [arguments.with_tensors(list(of_member)) for of_member in zip(*parts, strict=True)]
    return [list(each) for each in zip(*(rows_of(engine, each, method) for each in given), strict=True)]


def _by_plan_or_torch(
    engine: Engine,
    run: Callable[[], Result],
    as_plan: Callable[[], PlannedCall | None],
    by_members: Callable[[], Result],
) -> Result:
    """Run a call of one row, which makes its plan where there can be one; else what torch computes, by each member."""
    planned = as_plan()
    if planned is None:
        note(engine, None, False)
        return eagerly(engine, by_members)
    found, known = None, False
    if not planned.refused:
        found = run()
        known = _known(as_plan)
    if engine.states.rows_by_plan.setdefault(planned.key, known) != known:  # the check of a plan looks at numbers
        warnings.warn(
            f"fastens: deterministic: a row has {'a plan now, and had none' if known else 'no plan now, and had one'}, "
            f"so its last bits may be others than before ({engine.plans.why_not or 'after a change'})",
            stacklevel=8,
        )
    found = found if known else None
    note(engine, planned, found is not None)
    return eagerly(engine, by_members) if found is None else found


def _known(as_plan: Callable[[], PlannedCall | None]) -> bool:
    """Whether a call has a plan now."""
    planned = as_plan()
    return planned is not None and planned.known


def drawn(call: DrawnCall, engine: Engine, arguments: Arguments, members: Tensor) -> Any:
    """Return what a member returns, each row by its own member and to the bits that it has alone."""
    if len(members) > 1:
        planned, found = call.planned_answer()
        if found is not None:
            note(engine, planned, True)
            return found
    with engine.turn():
        return _drawn_by_rows(call, engine, arguments)


def _drawn_by_rows(call: DrawnCall, engine: Engine, arguments: Arguments) -> Any:
    rows = rows_of(engine, arguments, "forward")
    if len(rows) == 1:
        alone = call.of_row(rows[0], 0)
        return _by_plan_or_torch(engine, alone.at_once, lambda: alone.as_plan()[0], alone.by_member)
    parts = [pytree.tree_flatten(call.of_row(row, i).run()) for i, row in enumerate(rows)]
    leaves = [
        torch.cat(c) if isinstance(c[0], Tensor) else alike(c, "rows") for c in zip(*(x for x, _ in parts), strict=True)
    ]
    call.plan_exactly(leaves)
    return pytree.tree_unflatten(leaves, parts[0][1])


def rows_of(engine: Any, arguments: Arguments, method: str) -> list[Arguments]:
    """The call of each row, on copies that are laid out alike.

    Raises:
        NotReproducible: a row's result is not its own.
    """
    if arguments.batch_size != 1 and arguments.tensors:
        excluded = engine.rows.excluded(engine, arguments, method)
        if excluded is None:
            raise NotReproducible(
                f"deterministic: a row's result depends on other rows, or an output does not carry the rows, or the "
                f"network takes no other numbers to try that; {REMEDY}"
            )
        arguments = arguments.excluding(excluded)
    if engine.behaviour.writes_itself:
        raise NotReproducible(f"deterministic: the network writes to itself, so no row is evaluated alone; {REMEDY}")
    size = arguments.batch_size
    parts = [arguments.selected(torch.tensor([i])) for i in range(size)] if size != 1 else [arguments]
    return [part.with_tensors([_dense(x) for x in part.tensors]) for part in parts]


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _laid_out(arguments: Arguments) -> Arguments:
    """A call whose tensors have the strides of contiguous ones, in dimensions of one element too."""
    tensors = arguments.tensors
    if all(x.stride() == contiguous(x.shape) for x in tensors):
        return arguments
    return arguments.with_tensors([_dense(x) for x in tensors])


def differs(made: list[Tensor], expected: list[Tensor]) -> str:
    """Return why a plan of several rows may not be used: other bits than the rows have alone; else empty."""
    return "" if all(map(_same_bits, made, expected)) else _OTHER_BITS


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


class Modules:
    """Members that are modules of their own, as evidence of rows sees an engine.

    Args:
        network: the list of modules.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.views = list(network.children())
        self.behaviour = Behaviour(looped=True, why="they are modules of their own")
        self.rows = self
        self.state_of_python: Any = None  # which nothing counts
        self.turn = nullcontext  # each thread calls members as they are
        self._found = _FOUND.setdefault(network, [RowsOfMembers() for _ in self.views])

    def call_module(self, module: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a member returns."""
        args, kwargs = arguments.of_member(k)
        return module(*args, **kwargs) if method == "forward" else getattr(module, method)(*args, **kwargs)

    def view(self, k: int) -> nn.Module:
        """One of them."""
        return self.views[k]

    def excluded(self, _: Any, arguments: Arguments, method: str) -> frozenset[int] | None:
        """Positions of leaves that only look like the batch; none where a member mixes rows, or members disagree."""
        found = {rows.excluded(self._alone(k), arguments, method) for k, rows in enumerate(self._found)}
        return found.pop() if len(found) == 1 else None

    def _alone(self, k: int) -> Any:
        other = copy.copy(self)
        other.views = self.views[k : k + 1]
        return other


_FOUND: weakref.WeakKeyDictionary[nn.Module, list[RowsOfMembers]] = weakref.WeakKeyDictionary()


def each_row(
    network: nn.Module, arguments: Arguments, run: Callable[[Arguments, slice], list[Any]], method: str = "forward"
) -> list[Any]:
    """The leaves of a call of members that are modules, and their structure, each row's by itself in the mode.

    Args:
        network: the list of modules.
        arguments: of the call.
        run: given arguments and the rows that these are, the leaves of what K members return and the structure.
        method: what is called.
    """
    if not reproducible.enabled() or torch.compiler.is_compiling():
        return run(arguments, slice(None))
    modules = Modules(network)
    rows = rows_of(modules, arguments, method)
    if not rows:
        return run(arguments, slice(None))
    return joined([eagerly(modules, functools.partial(run, row, slice(i, i + 1))) for i, row in enumerate(rows)], 1)


def each_member(
    network: nn.Module, arguments: Arguments, call: Callable[[int, Arguments], Any], method: str = "forward"
) -> list[Any]:
    """The same of all members, of which ``call(k, arguments)`` is what member k returns."""
    count = len(list(network.children()))

    def run(given: Sequence[Arguments]) -> list[Any]:
        return columns_of([pytree.tree_flatten(call(k, own)) for k, own in enumerate(given)])

    if not reproducible.enabled() or torch.compiler.is_compiling():
        return run([arguments] * count)
    modules = Modules(network)
    rows = rows_of(modules, arguments, method)
    if not rows:
        return run([arguments] * count)
    own = _own_rows(modules, arguments, rows, count, method)
    return joined([eagerly(modules, functools.partial(run, each)) for each in own], 1)
