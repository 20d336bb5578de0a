"""One call as a plan: by which key it is known, what the plan gets, how it is recorded, and how it is audited."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import reproducible
from fastens.device import capturing
from fastens.engine.arguments import Arguments
from fastens.engine.check import beyond_rounding
from fastens.engine.entry import Entry, OtherNumbers
from fastens.engine.guards import in_modes, modes
from fastens.engine.leaves import Leaves, recorded, recorded_rows
from fastens.engine.memory_cap import suppress_out_of_memory
from fastens.engine.numbers import Numbers
from fastens.engine.structure import exactly
from fastens.fold.tensor import Hidden, MemberTensor, NotFoldable, all_members, one_member
from fastens.network.folded import lists_weights
from fastens.network.state import state_kept
from fastens.network.tables import alone
from fastens.trace.record import NotRecordable, record, trace_of

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


class PlannedCall:
    """A call of an engine, as its plans see it.

    Args:
        engine: whose call it is.
        arguments: of the call.
        hidden: the rows, where each has a member of its own; else all members.

    Attributes:
        key: the signature; none where numbers among the arguments take any value and the network reads them.
    """

    def __init__(self, engine: Engine, arguments: Arguments, hidden: Hidden | None = None) -> None:
        self._engine = engine
        self._arguments = arguments
        self._hidden = hidden or all_members(engine.num_members)
        self._dealt = self._hidden.offsets is not None
        self._modes = modes()
        engine.numbers.note(arguments)
        varying = arguments.varying
        self._varies = bool(varying)
        self.key: Any = self._key(varying) if varying else self._key()
        refused = engine.plans.why_refused(self.key) if varying else None
        if refused is not None:
            self._varies = False
            self.key = None if arguments.free else self._key()
        if self.key is None:
            engine.plans.why_not = f"a number among the arguments varies, and {refused}; pass it as a tensor"

    def _key(self, varying: Any = ()) -> Any:
        key = self._arguments.plan_key(varying)
        if reproducible.enabled():
            key = ("deterministic", key)
        return self._modes, ("drawn", key, self._arguments.rows_at) if self._dealt else key

    @property
    def _values(self) -> dict[int, float]:
        return {i: self._arguments.leaves[i] for i in self._arguments.varying} if self._varies else {}

    @property
    def inputs(self) -> list[Tensor]:
        """What the plan is run on: the tensors of the call, what fresh masks depend on, and the members of the rows."""
        engine, hidden = self._engine, self._hidden
        inputs = list(self._arguments.tensors)
        if engine.kind.fresh:
            dropouts = engine.kind.dropouts(hidden, self._arguments)
            assert dropouts.samples is not None
            inputs += [dropouts.drawn(), dropouts.samples]
        if hidden.offsets is not None:
            assert hidden.row_members is not None
            inputs += [hidden.offsets, hidden.row_members]
        return inputs

    def run(self) -> list[Any] | None:
        """Run the plan.

        Returns:
            The leaves of the members' outputs in memory of their own, [K, ...] or K times the same, and their structure
            last; none without plan.
        """
        entry = None if self.key is None else self._engine.plans.current(self.key)
        outputs = None if entry is None else self._run(entry, self.inputs)
        if entry is None or outputs is None:
            return None
        leaves = entry.leaves.whole(outputs)
        if not _due(entry.calls):
            return leaves
        return leaves if self._holds(entry, leaves) else None

    def run_sum(self, weights: list[float]) -> tuple[Tensor, Any] | None:
        """The members' only output summed with K factors, [B, ...], and its structure; none without such a plan."""
        entry = None if self.key is None else self._engine.plans.current(self.key)
        if entry is None or not entry.plan.sums or entry.leaves.kinds != ("rows",):
            return None
        inputs = self.inputs
        outputs = self._run(entry, inputs, weights)
        if outputs is None:
            return None
        total = outputs[0]
        if _due(entry.calls):
            calls = entry.calls
            leaves = entry.leaves.whole(entry.run(inputs, self._values))
            entry.calls = calls
            if not self._holds(entry, leaves):
                return None
        return total, entry.leaves.spec

    def _run(self, entry: Entry, inputs: list[Tensor], weights: list[float] | None = None) -> list[Tensor] | None:
        """Run a plan. None where it takes no such numbers: then the signature is refused from now on."""
        try:
            return entry.run(inputs, self._values, weights)
        except OtherNumbers as error:
            self._engine.plans.refuse(self.key, f"{error}")
            return None

    @property
    def known(self) -> bool:
        """Whether the signature has a plan that is true now."""
        return self.key is not None and self._engine.plans.current(self.key) is not None

    @property
    def refused(self) -> bool:
        """Whether the signature has no plan, and gets none while network and weights are as they are."""
        return self.key is None or self._engine.plans.refused(self.key)

    def make(
        self, expected: list[list[Tensor]] | None = None, differs: Callable[[list[Any]], str] = lambda _: ""
    ) -> list[Any] | None:
        """Make the plan, where the memory holds a recording, and run it.

        Args:
            expected: the members' own outputs; none where the fold was held against them already.
            differs: given the plan's outputs, why there shall be no such plan; empty where there may be.
        """
        engine, arguments, hidden = self._engine, self._arguments, self._hidden
        if self.key is None:
            return None
        whole, member, numbers = self.passes()
        with torch.no_grad(), suppress_out_of_memory():
            dropouts = engine.kind.dropouts(hidden, arguments)
            made = engine.plans.make(
                self.key,
                whole,
                member,
                self.inputs,
                expected,
                call=arguments.described("one member a row" if self._dealt else ""),
                dealt=self._dealt,
                dropouts=dropouts,
                numbers=numbers,
            )
            if (
                made is None and self._varies and engine.plans.why_refused(self.key)
            ):  # such as a flag, whose values have plans of their own
                return PlannedCall(engine, arguments, self._hidden).make(expected, differs)
            if made is not None and (why := differs(made)):
                engine.plans.refuse(self.key, why)
                return None
            return made
        engine.plans.decline("recording it ran out of memory")
        return None

    def passes(self, differentiated: bool = False) -> tuple[Any, Any, Numbers | None]:
        """Return the pass and one member's call as functions of the plan's inputs, and the numbers that vary."""
        engine, arguments, hidden, ambient = self._engine, self._arguments, self._hidden, self._modes
        count, fresh = len(arguments.tensors), engine.kind.fresh
        numbers = Numbers(self._values, dict(arguments.varying)) if self._varies else None

        def given(tensors: list[Tensor], anew: bool = False) -> Arguments:
            other = arguments.with_tensors(tensors[:count])
            if fresh and anew:
                other.evaluation = (arguments.evaluation[0], int(tensors[count][0]))
            return other

        def whole(tensors: list[Tensor]) -> tuple[list[Tensor], Leaves]:
            samples = tensors[count + 1] if fresh else None
            own = dataclasses.replace(hidden, offsets=tensors[-2], row_members=tensors[-1]) if self._dealt else hidden
            fold = engine.new_pass(own, given(tensors), recording=True, samples=samples, numbers=numbers)
            if differentiated:
                fold.dropouts.as_factors()
            output = engine.run(fold, given(tensors), rows=self._dealt)
            return recorded_rows(output, own) if self._dealt else recorded(output, own)

        def member(
            tensors: list[Tensor], values: dict[int, float] | None = None, exact: bool = False
        ) -> list[Tensor] | None:
            k, other = int(tensors[-1][0]) if self._dealt else 0, given(tensors, anew=True).with_numbers(values or {})
            if exact:
                return exactly(engine, k, other)
            with in_modes(ambient):  # which the pass is recorded in others than
                answer = self._alone(k, other)  # which spares a first call the making of modules for all members
                found = answer or pytree.tree_leaves(engine.call_member(k, other))
            if any(isinstance(x, Tensor) and x.requires_grad for x in found):
                raise NotRecordable("gradients are asked for by a tensor that is no parameter and no buffer")
            return [x for x in found if isinstance(x, Tensor)]

        return whole, member, numbers

    # Audit

    def _holds(self, entry: Entry, leaves: list[Any]) -> bool:
        """Whether a plan's answer is a drawn member's, as that is now; if not, warn, and forget every plan."""
        with self._engine.turn():
            return self._holds_now(entry, leaves)

    def _holds_now(self, entry: Entry, leaves: list[Any]) -> bool:
        engine, hidden = self._engine, self._hidden
        number = entry.calls * 0x9E3779B1 >> 7
        if hidden.row_members is None:
            k, rows = number % engine.num_members, None
        else:
            k = int(hidden.row_members[number % hidden.size])
            rows = (hidden.row_members == k).nonzero()[:, 0]
        ours = [x if rows is None else x[rows.to(x.device)] for x in leaves[:-1] if isinstance(x, Tensor)]
        ours = [x[k] for x in ours] if rows is None else ours
        error: float | None = float("inf")

        def of_rows(given: list[Tensor]) -> list[Tensor]:
            return given if rows is None else [x[rows.to(x.device)] for x in given]

        def exact() -> list[Tensor] | None:
            single = exactly(engine, k, self._arguments)
            return None if single is None else of_rows(single)

        for answer in (self._alone, self._folded):
            theirs = of_rows(answer(k, self._arguments))
            if len(ours) == len(theirs):
                error = beyond_rounding(ours, theirs, engine.plans.guards.parameters, exact)
                if error is None:
                    return True
        where = self._first_difference(entry)
        engine.refresh()
        warnings.warn(
            f"fastens: a plan is {error:.1e} from member {k} as it is now, {where}: it is dropped; after "
            "a change that cannot be noticed, as by .data in place or of code, call refresh()",
            stacklevel=6,
        )
        return False

    def _alone(self, k: int, arguments: Arguments) -> list[Tensor]:
        """Return member k's tensors now, by the network's own modules on its weights.

        Empty where they need the fold.
        """
        engine = self._engine
        if not engine.kind.runs_alone or lists_weights(engine.network):
            return []
        try:
            with state_kept(engine.network), alone(k):
                args, kwargs = arguments.of_member(k)  # copies, which the network may write to
                output = engine.network(*args, **kwargs)
        except Exception:  # whatever it is, the fold decides
            return []
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        return [] if any(isinstance(x, MemberTensor) for x in tensors) else tensors  # of weights in no table

    def _folded(self, k: int, given: Arguments) -> list[Tensor]:
        """Return member k's tensors now, by a pass whose only member it is."""
        engine, arguments = self._engine, given.copied()
        if engine.kind.runs_alone:
            try:
                with state_kept(engine.network):
                    leaves = engine.one_pass(arguments, one_member(engine.num_members, k))
            except NotFoldable:  # a recording has wrappers from birth, an eager pass where a first call asked for them
                arguments = given.copied()
            else:
                return [x[0] for x in leaves[:-1] if isinstance(x, Tensor)]
        return [x for x in pytree.tree_leaves(engine.call_member(k, arguments)) if isinstance(x, Tensor)]

    def _first_difference(self, entry: Entry) -> str:
        """The first step at which a pass that is recorded now differs from what the plan was recorded from."""
        whole, _, _ = self.passes()
        try:
            with state_kept(self._engine.network):
                inputs = self.inputs
                recording, _ = record(lambda: whole(inputs), inputs)
        except (NotRecordable, NotFoldable, RuntimeError) as error:
            return f"and can no longer be recorded ({error})"
        now = trace_of(recording)
        for i, (old, new) in enumerate(zip(entry.trace, now, strict=False)):
            if old != new:
                return f"first at step {i}, {_cut(old)}, now {_cut(new)}"
        return (
            f"at step {min(len(entry.trace), len(now))}, where one ends"
            if len(now) != len(entry.trace)
            else ("though every step is the same")
        )


def _cut(step: str) -> str:
    return step if len(step) <= 300 else f"{step[:300]}..."


def _due(calls: int) -> bool:
    """Whether the plan's answer at this call is audited: at calls 2, 4, 8, ..., unless ``FASTENS_AUDIT`` says else."""
    mode = os.environ.get("FASTENS_AUDIT", "sampled")
    due = calls & (calls - 1) == 0 if mode == "sampled" else mode == "always"
    return due and not capturing()
