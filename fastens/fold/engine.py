"""Evaluating all members of one structure: the folded pass, the loop it is checked against, and the choice."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.fold.arguments import Arguments
from fastens.fold.check import relative_error
from fastens.fold.drawn import fold_drawn, grouped, joined, run_drawn
from fastens.fold.first import Established, FirstPass, established_by_sketch
from fastens.fold.looped import call_member, member_tensors
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.members import replaced, tensors_of
from fastens.fold.memory_cap import MemoryCap, suppress_out_of_memory
from fastens.fold.network import build_network, layer_reports
from fastens.fold.planned import Plans
from fastens.fold.rows import NotFoldable, Rows
from fastens.ops.run_program import target
from fastens.report import Report

_MOST_DEALT = 64  # signatures of drawn calls


class FoldEngine:
    """K members of one structure.

    Attributes:
        network: the folded network, which owns the stacks.
        skeleton: one member's structure without weights, on which the loop calls each member.
        shared: names of the tensors that are equal in all members and held once.
        engine: ``fold`` or ``loop``.
        sums: whether :meth:`evaluate_sum` may stand for :meth:`evaluate`; not where a call begins with more than that.
    """

    sums = True

    def __init__(
        self,
        skeleton: nn.Module,
        stacks: dict[str, Tensor],
        shared: frozenset[str],
        num_members: int,
        settings: dict[str, Any],
    ) -> None:
        self.rows = Rows(num_members, settings["backend"] == "reference")
        self.skeleton = skeleton
        self.shared = shared
        self.num_members = num_members
        self.cap = MemoryCap(settings["max_fold"])
        self.backend: str = settings["backend"]
        self.network = build_network(skeleton, stacks, shared, self.rows)
        self.plans = Plans(self.network, num_members, self.backend)
        self.engine = "loop" if settings["engine"] == "loop" else "fold"
        self.why = "asked for" if settings["engine"] != "auto" else "members agree in structure and parameter shapes"
        # signature, and whether it takes several passes -> leaves that only look like the batch
        self._checked: dict[Any, frozenset[int]] = {}
        time_first = (
            path or type(m).__name__ for path, m in skeleton.named_modules() if getattr(m, "batch_first", True) is False
        )
        self._time_first = next(time_first, None)
        self._called = False  # apart from _checked, whose keys torch 2.11 cannot trace
        self._dealt: dict[Any, frozenset[int]] = {}  # the same, by the plan of a drawn call
        self._batch_norms = [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def member(self, k: int) -> nn.Module:
        """A module with a copy of member k's weights."""

        def copied(name: str, like: Tensor, value: Tensor) -> Tensor:
            clone = value.detach().clone()
            return nn.Parameter(clone, like.requires_grad) if isinstance(like, nn.Parameter) else clone

        values = member_tensors(self.network, k)
        return replaced(self.skeleton, {n: copied(n, t, values[n]) for n, t in tensors_of(self.skeleton).items()})

    def refresh(self) -> None:
        """Forget which signatures were checked, what they need of memory, and the plans with their packed weights."""
        self._checked.clear()
        self._dealt.clear()
        self.cap.clear()
        self.plans.clear()

    # Passes

    def evaluate(self, arguments: Arguments, training: bool) -> list[Any]:
        """Run all members; return the leaves of their outputs, [K, B, ...] or a list of K, and the structure last.

        Args:
            arguments: of the call; members share their rows or have their own.
            training: the mode of the ensemble.
        """
        if self.engine == "loop":
            return self._loop(arguments)
        eager = not torch.compiler.is_compiling() and not _capturing()
        rows = self.num_members * arguments.batch_size
        plannable = type(arguments) is Arguments and self._can_plan(arguments, rows)
        planned = self.plans.run(arguments.plan_key(), self._inputs(arguments)) if plannable else None
        plannable = plannable and eager  # a graph that is being recorded holds a plan that was made before
        key = None
        if planned is None:
            key = self._key(arguments, training) if eager else None
            excluded, planned = self._established(arguments, training, plannable)
            if self.engine == "loop":
                return self._loop(arguments)
            arguments = arguments.excluding(excluded)
            if plannable and planned is None:
                planned = self._planned(arguments, key)
        if planned is None:
            return self._fold(arguments, key)
        leaves, spec = planned
        return [*(self._unfolded(leaf, arguments.batch_size) for leaf in leaves), spec]

    def _inputs(self, arguments: Arguments, order: Tensor | None = None) -> list[Tensor]:
        """What a plan is run on: the tensors of a call, whose samples are in this order where rows are dealt out."""
        return arguments.tensors

    def evaluate_sum(self, arguments: Arguments, weights: list[float]) -> tuple[Tensor, Any] | None:
        """The members' only output, summed with K factors as the last layer computes it, [B, ...], and its structure.

        None where no plan of this call does that: then evaluate, and add.
        """
        rows = self.num_members * arguments.batch_size
        if self.engine == "loop" or not self._can_plan(arguments, rows):
            return None
        return self.plans.run_sum(arguments.plan_key(), self._inputs(arguments), weights)

    @staticmethod
    def _key(arguments: Arguments, training: bool) -> tuple[Any, ...]:
        return arguments.signature(), training, torch.is_grad_enabled()

    def _can_plan(self, arguments: Arguments, rows: int) -> bool:
        whole = self.cap.asked is None or rows <= self.cap.asked
        return whole and arguments.plain() and self.plans.can_plan(arguments.tensors)

    def _planned(
        self,
        arguments: Arguments,
        key: Any,
        expected: list[list[Tensor]] | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[list[Tensor], Any] | None:
        """Make the plan of a signature, where the memory holds a recording, and run it.

        Args:
            arguments: of the call.
            key: the signature.
            expected: the members' own outputs; none where the fold was held against them already.
            around: makes what the pass is recorded in.
        """

        def whole(tensors: list[Tensor]) -> Any:
            with around():
                return self._pass(arguments.with_tensors(tensors), None, None)

        def member(tensors: list[Tensor]) -> Any:
            return self._call(0, *arguments.with_tensors(tensors).of_member(0))

        if not self.cap.holds_recording(key, self.num_members * arguments.batch_size):
            return None
        with suppress_out_of_memory():
            return self.plans.make(arguments.plan_key(), whole, member, self._inputs(arguments), expected)
        return None

    def evaluate_drawn(self, arguments: Arguments, members: Tensor, training: bool) -> Any:
        """Run for each sample only its member, ``members`` int64 [B] on the CPU; return what a member returns."""
        eager = not torch.compiler.is_compiling() and not _capturing()
        plannable = eager and self.engine == "fold" and len(members) > 0 and self._can_plan(arguments, len(members))
        plan_key = ("drawn", arguments.plan_key()) if plannable else None
        excluded = self._dealt.get(plan_key)
        if excluded is None:
            several = plannable and self.num_members > 1
            planned = self._first_drawn(arguments, members, plan_key, training) if several else None
            if planned is not None:
                return planned
            excluded = self._established(arguments, training)[0] if self.engine == "fold" else frozenset()
        arguments = arguments.excluding(excluded)
        if self.engine == "loop":
            return run_drawn(self._call_some, arguments, members)
        if plannable:
            planned = self._planned_drawn(arguments, members, plan_key, training)
            if planned is not None:
                self._dealt = {} if len(self._dealt) > _MOST_DEALT else self._dealt
                self._dealt[plan_key] = excluded
                return planned
        key = self._key(arguments, training) if eager else None

        def passes(run: Callable[[int, int], Any]) -> list[Any]:
            return self.cap.run(key, len(members), run, self._kept_together(len(members)))

        return fold_drawn(
            lambda index, offsets: self._pass(arguments, index, offsets), self.num_members, passes, members
        )

    def _first_drawn(self, arguments: Arguments, members: Tensor, plan_key: Any, training: bool) -> Any:
        """Plan a drawn call without a pass of all members, where the plan gives what the drawn ones do; else none."""
        rows, key = self.num_members * arguments.batch_size, self._key(arguments, training)
        if not self.cap.holds_recording(key, rows):
            return None
        with torch.no_grad(), suppress_out_of_memory():
            found = established_by_sketch(self, arguments)
            planned = self._planned_drawn(arguments, members, plan_key, training, sketched=True) if found else None
            if planned is not None:
                self._called = True
                self._dealt[plan_key] = frozenset()
            return planned
        return None

    def _planned_drawn(
        self, arguments: Arguments, members: Tensor, plan_key: Any, training: bool, sketched: bool = False
    ) -> Any:
        """Run the plan of a call whose samples go to one member each, whichever; none where there is no plan.

        A new plan is ``sketched``, and held against the drawn members, where the fold was not held against them.
        """
        order, offsets = grouped(members, self.num_members)
        dealt = arguments.selected(order)
        inputs = [*self._inputs(dealt, order), offsets, members.index_select(0, order)]

        def whole(tensors: list[Tensor]) -> Any:
            return self._dealt_pass(dealt.with_tensors(tensors[:-2]), *tensors[-2:])

        def member(tensors: list[Tensor]) -> Any:
            return self._call(int(tensors[-1][0]), *dealt.with_tensors(tensors[:-2]).call)

        found = self.plans.run(plan_key, inputs)
        if found is None and self.cap.holds_recording(self._key(arguments, training), len(members)):
            with suppress_out_of_memory():
                expected = None
                if sketched:
                    leaves = pytree.tree_leaves(run_drawn(self._call_some, arguments, members))
                    expected = [[x.index_select(0, order) for x in leaves if isinstance(x, Tensor)]]
                found = self.plans.make(plan_key, whole, member, inputs, expected, dealt=True)
        if found is None:
            return None
        leaves, spec = found
        return joined([pytree.tree_unflatten(leaves, spec)], order)

    def _established(self, arguments: Arguments, training: bool, plannable: bool = False) -> Established:
        """The leaves that only look like the batch, from the first eager pass of this signature.

        Where a plan is wanted and can be made without a folded pass, its outputs too.
        """
        if torch.compiler.is_compiling() or _capturing():
            if self._time_first and not self._called and self.num_members > 1:
                raise RuntimeError(
                    f"{self._time_first!r} takes time before batch, and where the batch is in the layers around it is "
                    "found in the first call. Call the ensemble once before it is compiled, exported or captured"
                )
            return frozenset(), None
        key, total = self._key(arguments, training), self.num_members * arguments.batch_size
        found = self._checked.get((key, self.cap.rows(key, total) < total))
        if found is None:
            found, planned = self._first(arguments, key, plannable)
            self._called = True
            if planned is not None:  # the fold itself was not held against the loop, and is where a plan cannot serve
                return found, planned
            self._checked[key, self.cap.rows(key, total) < total] = found
        return found, None

    def _first(self, arguments: Arguments, key: Any, plannable: bool) -> Established:
        return FirstPass(self, arguments, key, plannable).run()

    def _call(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_member(self.skeleton, member_tensors(self.network, k), args, kwargs)

    def _call_some(self, k: int, index: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run member k on the samples ``index`` of a drawn call."""
        return self._call(k, args, kwargs)

    def _loop(self, arguments: Arguments) -> list[Any]:
        flat = [pytree.tree_flatten(self._call(k, *arguments.of_member(k))) for k in range(self.num_members)]
        return [*(list(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)), flat[0][1]]

    def _pass(self, arguments: Arguments, index: Tensor | None, offsets: Tensor | None) -> Any:
        """One folded pass: all samples for every member, or the samples ``index`` dealt out by ``offsets``."""
        if index is None:
            args, kwargs = arguments.repeated(self.num_members)
            self.rows.set(self.num_members * arguments.batch_size)
        else:
            args, kwargs = arguments.selected(index).call
            self.rows.set(len(index), offsets)
        return self.network(*args, **kwargs)

    def _dealt_pass(self, arguments: Arguments, offsets: Tensor, row_members: Tensor) -> Any:
        """A folded pass over rows in the order of their members, without a shape that depends on whose they are."""
        args, kwargs = arguments.call
        self.rows.set(len(row_members), offsets, row_members)
        return self.network(*args, **kwargs)

    def _fold(self, arguments: Arguments, key: Any = None) -> list[Any]:
        members, batch = self.num_members, arguments.batch_size

        def run(start: int, stop: int) -> tuple[list[Any], Any]:
            if stop - start == members * batch:
                return pytree.tree_flatten(self._pass(arguments, None, None))
            offsets = (torch.arange(members + 1) * batch).clamp(start, stop) - start
            return pytree.tree_flatten(self._pass(arguments, arguments.fold_rows(start, stop), offsets))

        leaves, spec = _joined(self.cap.run(key, members * batch, run, self._kept_together(batch)))
        return [*(self._unfolded(leaf, batch) for leaf in leaves), spec]

    def _kept_together(self, batch: int) -> int:
        """How many rows must not be parted: those of one member where statistics are taken over them."""
        taken = any(norm.training or norm.stack("running_mean") is None for norm in self._batch_norms)
        return max(1, batch) if taken else 1

    def _unfolded(self, leaf: Any, batch: int) -> Any:
        if isinstance(leaf, MemberTensor):
            return leaf.stack
        if not isinstance(leaf, Tensor):
            return [leaf] * self.num_members
        if leaf.ndim == 0 or leaf.shape[0] != self.num_members * batch:
            raise NotFoldable(f"an output of shape {list(leaf.shape)} does not carry the batch in dimension 0")
        return leaf.unflatten(0, (self.num_members, batch))

    def verify(self, arguments: Arguments) -> float:
        """The largest relative error of a folded pass against the loop."""
        with torch.no_grad():
            engine, self.engine = self.engine, "fold"
            try:
                *folded, _ = self.evaluate(arguments, self.network.training)
            finally:
                self.engine = engine
            *looped, _ = self._loop(arguments)
        pairs = [(a, b) for a, b in zip(folded, looped, strict=True) if isinstance(b[0], Tensor)]
        return max((relative_error(a[k], x) for a, b in pairs for k, x in enumerate(b)), default=0.0)

    def report(self, backend: str) -> Report:
        """What each module that owns tensors got."""
        layers = layer_reports(self.network, self.num_members, self.why if self.engine == "loop" else None)
        plans = self.plans
        where = "" if plans.launched else target()  # launches run on no instruction set of the CPU
        found = (layers, plans.kinds, plans.why_not, plans.num_bytes)
        return Report(self.engine, self.num_members, self.why, *found, where, *plans.launches)


def _joined(parts: list[tuple[list[Any], Any]]) -> tuple[list[Any], Any]:
    """The leaves of several passes, one after the other in the batch, and their structure."""
    (first, spec), *others = parts
    if not others:
        return first, spec
    columns = zip(*(leaves for leaves, _ in parts), strict=True)
    return [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns], spec


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
