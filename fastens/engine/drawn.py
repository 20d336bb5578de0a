"""Calls in which each sample goes to one member only: the hidden dimension is the rows, at the price of one member."""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from fastens import reproducible
from fastens.device import capturing
from fastens.engine import row_by_row
from fastens.engine.arguments import Arguments
from fastens.engine.caches import remembers_calls
from fastens.engine.calls import PlannedCall
from fastens.engine.check import beyond_rounding
from fastens.engine.dealing import grouped, reordered, run_drawn
from fastens.engine.derivatives import Disturbed
from fastens.engine.leaves import alike, without_hidden
from fastens.engine.masks import NothingDropped
from fastens.engine.memory_cap import is_out_of_memory, suppress_out_of_memory
from fastens.engine.objects import unchanged
from fastens.engine.predictable import PredictableDraws
from fastens.engine.states import UNKNOWN, Folded, Looped
from fastens.engine.structure import exactly, uncounted
from fastens.engine.transformed import in_transform
from fastens.fold.callsite import counted_if_it_succeeds
from fastens.fold.sharing import Sharing, sharing_noted
from fastens.fold.tensor import Hidden, NotFoldable, ReadsValues
from fastens.fold.writes import NeedsWrappers, WritesInput
from fastens.network.state import TorchDraws, random_kept, state_kept

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


class DrawnCall:
    """One call in which each sample has its member.

    Args:
        engine: of the members.
        arguments: of the whole batch.
        members: int64 [B] on the CPU.
    """

    def __init__(self, engine: Engine, arguments: Arguments, members: Tensor) -> None:
        self._engine = engine
        self._arguments = arguments
        self._members = members

    def run(self) -> Any:
        """What a member returns for the whole batch, each sample by its own member."""
        if reproducible.enabled() and not torch.compiler.is_compiling():
            return row_by_row.drawn(self, self._engine, self._arguments, self._members)
        return self.at_once()

    def of_row(self, row: Arguments, i: int) -> DrawnCall:
        """The call of sample i alone, whose arguments are ``row``."""
        return DrawnCall(self._engine, row, self._members[i : i + 1])

    def at_once(self) -> Any:
        """The same as :meth:`run`, whatever a row's last bits depend on."""
        planned = None if torch.compiler.is_compiling() else self._planned_before()
        if planned is not None:
            return planned
        with self._engine.turn():
            return self._by_code()

    def _planned_before(self) -> Any:
        """The answer of the plan that there is, which waits for no other thread; none where there is none.

        None with gradients either: a checkpoint counts what is saved on the way to a plan.
        """
        engine = self._engine
        if torch.is_grad_enabled() or engine.behaviour.writes_itself or not len(self._members):
            return None
        return self.planned_answer()[1] if engine.rows.known(engine, self._arguments) else None

    def _by_code(self) -> Any:
        engine = self._engine
        if not engine.behaviour.looped and engine.guards.observed():
            return in_transform(engine, lambda call: run_drawn(call, self._arguments, self._members))
        alone = engine.behaviour.reads_rows and isinstance(engine.states.get(self._alone_key), Looped)
        if engine.behaviour.looped or alone or not len(self._members):
            return self._looped()
        try:
            with counted_if_it_succeeds():
                found = self._dealt_out()
        except Disturbed:
            return self._looped()
        except WritesInput:
            engine.behaviour.writes_arguments = True
            return DrawnCall(engine, self._arguments.copied(), self._members).at_once()
        except Exception as error:  # the members decide whether it is their own error
            if is_out_of_memory(error) or isinstance(error, NothingDropped | StopRecomputation):
                raise
            if isinstance(error, NeedsWrappers) and not engine.behaviour.wrapped:
                engine.behaviour.wrapped = True
                return self.at_once()
            why, reads = f"{type(error).__name__}: {error}", isinstance(error, ReadsValues)
        else:
            return self._looped() if found is None else found
        why = f"the fold of drawn rows failed where they do not: {why}"
        alone = reads and not engine.behaviour.writes_itself  # what members remember is in one place
        if alone:
            engine.unshare_all()
        result = self._looped()
        if not alone:
            engine.give_up(why)
        else:
            engine.behaviour.reads_rows = True
            engine.states.put(self._alone_key, Looped(call=_described(self._arguments), why=why))
            warnings.warn(
                f"fastens: members are evaluated one by one where each row has its own, because {why}", stacklevel=6
            )
        return result

    @property
    def _alone_key(self) -> Any:
        """What tells calls whose rows are looped by themselves from others."""
        modes = self._engine.network.training, torch.is_grad_enabled(), torch.is_autocast_enabled()
        return "drawn, and fails", self._arguments.signature(), modes

    def _dealt_out(self) -> Any:
        """Return the answer of one pass over rows grouped by member, or of its plan.

        None where members must be looped.
        """
        engine, arguments = self._engine, self._arguments
        eager = not torch.compiler.is_compiling()
        excluded = engine.rows.excluded(engine, arguments) if eager else frozenset()
        if eager and engine.behaviour.writes_itself and not self._caches_filled():
            return None
        if excluded is None:
            why = "members mix the rows of a batch, so each that has some is called on all of it"
            engine.states.put(("drawn", arguments.signature()), Looped(call=_described(arguments), why=why))
            return None
        arguments = arguments.excluding(excluded)
        dealt, order, offsets, row_members = self._by_member(arguments)
        planned = self._plannable(dealt, offsets, row_members) if eager else None
        if planned is not None:
            found = planned.run()
            if found is not None:
                return _result(found, order)
        if eager and not capturing():
            engine.guards.check_memory()
        kind = "drawn", dealt.signature(), engine.network.training
        key = (*kind, torch.is_grad_enabled(), torch.is_autocast_enabled())
        first = eager and engine.states.of(key) is UNKNOWN and not capturing()
        weights = engine.weights_now() if first else None
        expected = self._expected() if first else None
        if first and engine.behaviour.writes_itself and not self._caches_filled():
            return None
        if planned is not None and not engine.behaviour.writes_itself and not (first and expected is None):
            found = self._planned(planned, (*kind, False), order, expected)
            if found is not None:
                return _result(found, order)
        memory = (*kind, torch.is_grad_enabled())
        with unchanged(arguments), sharing_noted() if first else nullcontext(list[Sharing]()) as passes:
            folded = engine.fold_apart(lambda: self._folded(dealt, memory, order, offsets, row_members))
        engine.hold_sharing(passes, self._arguments)
        if engine.functions:
            engine.hold_functions(arguments, self._one_by_one, self._at_once, "one member a row")
        if expected is not None:
            self._check(folded, expected, weights)
        if first:
            if expected is None:
                self._check_drawing_alike(arguments, weights)
            random = "members draw random numbers in this mode"
            why = random if expected is None else engine.plans.why_not
            engine.states.put(key, Folded(call=_described(dealt), why=why))
        return folded

    def _by_member(self, arguments: Arguments) -> tuple[Arguments, Tensor | None, Tensor, Tensor]:
        """Return the rows grouped by member, the order that did it, where groups begin [K+1], and each row's member."""
        order, row_members, offsets = grouped(self._members, self._engine.num_members)
        if order is None and self._engine.kind.by_sample:
            order = torch.arange(len(row_members))
        selected = arguments if order is None else arguments.selected(order)
        return selected.of_rows(row_members), order, offsets, row_members

    def _plannable(self, dealt: Arguments, offsets: Tensor, row_members: Tensor) -> PlannedCall | None:
        """Return the call as its plans see it; none, with the reason declined, where it may not run as one."""
        engine = self._engine
        if dealt.per_row:
            engine.plans.decline("an argument that each member has its own of carries no rows")
        elif engine.behaviour.writes_itself:
            engine.plans.decline("the network writes to itself")
        if dealt.per_row or engine.behaviour.writes_itself or not engine.can_plan(dealt):
            return None
        hidden = Hidden(len(row_members), engine.num_members, offsets=offsets, row_members=row_members)
        return PlannedCall(engine, dealt, hidden)

    def as_plan(self) -> tuple[PlannedCall | None, Tensor | None]:
        """The call as plans see it, none where it may not run as one, and the order of its samples there."""
        engine = self._engine
        looped = engine.behaviour.looped or engine.guards.observed()
        excluded = None if looped else engine.rows.excluded(engine, self._arguments)
        if excluded is None:
            return None, None
        dealt, order, offsets, row_members = self._by_member(self._arguments.excluding(excluded))
        return self._plannable(dealt, offsets, row_members), order

    def planned_answer(self) -> tuple[PlannedCall | None, Any]:
        """The call as plans see it, and the answer of the plan that there is; none where there is none."""
        planned, order = self.as_plan()
        found = None if planned is None else planned.run()
        return planned, None if found is None else _result(found, order)

    def plan_exactly(self, leaves: list[Any]) -> None:
        """Make a plan that gives ``leaves`` to the bit, where there is one."""
        planned, order = self.as_plan()
        if planned is None or planned.refused:
            return
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        expected = tensors if order is None else [x.index_select(0, order.to(x.device)) for x in tensors]

        def differs(made: list[Any]) -> str:
            return row_by_row.differs([x for x in made[:-1] if isinstance(x, Tensor)], expected)

        with torch.no_grad(), suppress_out_of_memory():
            planned.make([expected], differs)

    def _caches_filled(self) -> bool:
        """Whether members leave nothing behind but caches, which all of them have filled; else they are looped."""
        engine, arguments = self._engine, self._arguments
        key = (arguments.signature(), engine.network.training)
        if key not in engine.states.filled:
            if remembers_calls(engine, arguments):
                engine.give_up("the network remembers its calls, and a draw calls some members only")
                return False
            with uncounted(), torch.no_grad():
                engine.fold(arguments)
            engine.states.filled.add(key)
        return True

    def by_member(self) -> Any:
        """The answer of each member by itself."""
        return run_drawn(self._engine.call_member, self._arguments, self._members)

    def _looped(self) -> Any:
        if not (torch.compiler.is_compiling() or capturing()):
            self._engine.guards.check_memory()
        return run_drawn(functools.partial(self._engine.call_member, remembers=True), self._arguments, self._members)

    def _expected(self) -> list[Tensor] | None:
        """What the members give, which a first pass is held against; none where they draw random numbers."""
        engine = self._engine
        with uncounted(), random_kept(), torch.no_grad(), unchanged(self._arguments), ExitStack() as kept:
            changed = [kept.enter_context(state_kept(network)) for network in (engine.network, *engine.views)]
            draws = TorchDraws()
            outputs = self._one_by_one(self._arguments.copied())
            random = draws.drawn()
        engine.behaviour.writes_itself = engine.behaviour.writes_itself or any(changed)
        return None if random else outputs

    def _one_by_one(self, arguments: Arguments) -> list[Tensor]:
        """The tensors that the members give, one member after the other on the whole batch."""
        engine, views = self._engine, self._engine.views

        def answer(k: int, given: Arguments) -> Any:
            return engine.call_module(views[k], k, given, "forward")

        output = run_drawn(answer, arguments, self._members)
        return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

    def _at_once(self, arguments: Arguments) -> list[Tensor]:
        """The same of one pass over rows grouped by member."""
        dealt, order, offsets, row_members = self._by_member(arguments)
        output = self._folded(dealt, ("drawn", "gradients"), order, offsets, row_members)
        return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

    def _check(self, folded: Any, expected: list[Tensor], weights: Any) -> None:
        """Raise NotFoldable where a fold parts from the members whose weights were as these are."""
        ours = [x for x in pytree.tree_leaves(folded) if isinstance(x, Tensor)]
        error = beyond_rounding(ours, expected, self._engine.plans.guards.parameters, self._exactly)
        if error is not None:
            kind = NotFoldable if self._engine.weights_now() == weights else Disturbed
            raise kind(f"the fold is {error:.1e} from the members")

    def _check_drawing_alike(self, arguments: Arguments, weights: Any) -> None:
        """The same for members that draw random numbers, which fold and members draw alike for once."""
        networks = self._engine.network, *self._engine.views
        with uncounted(), random_kept(), torch.no_grad(), unchanged(arguments), PredictableDraws(), ExitStack() as kept:
            _ = [kept.enter_context(state_kept(network)) for network in networks]
            try:
                expected = self._one_by_one(arguments.copied())
            except Exception as error:  # it takes no such numbers
                if is_out_of_memory(error):
                    raise
                return
            self._check(self._at_once(arguments.copied()), expected, weights)

    def _exactly(self) -> list[Tensor] | None:
        """What the members give in float32."""
        found = {k: exactly(self._engine, k, self._arguments) for k in set(self._members.tolist())}
        if any(single is None for single in found.values()):
            return None
        output = run_drawn(lambda k, _: found[k], self._arguments, self._members)
        return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

    def _folded(self, dealt: Arguments, key: Any, order: Tensor | None, offsets: Tensor, row_members: Tensor) -> Any:
        engine, rows = self._engine, len(row_members)

        def some(start: int, stop: int) -> Any:
            hidden = Hidden(
                stop - start,
                engine.num_members,
                offsets=offsets.clamp(start, stop) - start,
                row_members=row_members[start:stop].to(_device(dealt)),
            )
            given = dealt if stop - start == rows else dealt.selected(torch.arange(start, stop))
            output = engine.run(engine.new_pass(hidden, given), given, rows=True)
            return pytree.tree_map(lambda x: without_hidden(x, hidden), output)

        if torch.compiler.is_compiling():
            return reordered(some(0, rows), order)
        parts = [pytree.tree_flatten(part) for part in engine.cap.run(key, rows, some)]
        columns = zip(*(leaves for leaves, _ in parts), strict=True)
        leaves = [torch.cat(c) if isinstance(c[0], Tensor) else alike(c, "rows") for c in columns]
        return reordered(pytree.tree_unflatten(leaves, parts[0][1]), order)

    def _planned(
        self, planned: PlannedCall, key: Any, order: Tensor | None, expected: list[Tensor] | None
    ) -> list[Any] | None:
        """Make the plan of a call whose samples go to one member each, whichever, and run it; none without plan."""
        engine = self._engine
        if planned.refused:
            return None
        if not engine.cap.holds_recording(key, len(self._members)):
            engine.plans.decline("the free memory does not hold a recording of it")
            return None
        with torch.no_grad(), suppress_out_of_memory():
            if expected is not None and order is not None:
                expected = [x.index_select(0, order.to(x.device)) for x in expected]
            return planned.make(None if expected is None else [expected])
        engine.plans.decline("recording it ran out of memory")
        return None


def _described(arguments: Arguments) -> str:
    return arguments.described("one member a row")


def _result(found: list[Any], order: Tensor | None) -> Any:
    *leaves, spec = found
    output = pytree.tree_unflatten([x[0] if isinstance(x, list) else x for x in leaves], spec)
    return output if order is None else reordered(output, order)  # plans keep no outputs


def _device(arguments: Arguments) -> torch.device:
    return arguments.batch.device
