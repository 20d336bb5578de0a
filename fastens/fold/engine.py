"""Evaluating all members of one structure: the folded pass, the loop it is checked against, and the choice."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.fold.arguments import Arguments, establish_excluded
from fastens.fold.check import Recording, buffers_kept, establishing, first_parting, relative_error, tolerance_for
from fastens.fold.drawn import fold_drawn, grouped, joined, run_drawn
from fastens.fold.looped import call_member, member_tensors
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.members import replaced, tensors_of
from fastens.fold.memory_cap import MemoryCap, suppress_out_of_memory
from fastens.fold.network import build_network, folded_modules, layer_reports
from fastens.fold.planned import Plans, can_plan
from fastens.fold.rows import NotFoldable, Rows
from fastens.report import Report

_MAX_REPAIRS = 8  # modules looped one after the other before the whole network is
_MOST_DEALT = 64  # signatures of drawn calls
_DIFFERS = "the result differs from the members'"


class FoldEngine:
    """K members of one structure.

    Attributes:
        network: the folded network, which owns the stacks.
        skeleton: one member's structure without weights, on which the loop calls each member.
        shared: names of the tensors that are equal in all members and held once.
        engine: ``fold`` or ``loop``.
    """

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
        self.plans = Plans(self.network, num_members)
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

    def evaluate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, kind: Callable[..., Arguments] = Arguments
    ) -> list[Any]:
        """Run all members; return the leaves of their outputs, [K, B, ...] or a list of K, and the structure last.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments.
            training: the mode of the ensemble.
            kind: reads the arguments: whether members share their rows or have their own.
        """
        arguments = kind(args, kwargs)
        if self.engine == "loop":
            return self._loop(arguments)
        eager = not torch.compiler.is_compiling() and not _capturing()
        plannable = eager and kind is Arguments and self._can_plan(arguments, self.num_members * arguments.batch_size)
        planned = self.plans.run(arguments.plan_key(), arguments.tensors) if plannable else None
        key = None
        if planned is None:
            key = self._key(arguments, training) if eager else None
            excluded, planned = self._established(args, kwargs, training, kind, plannable)
            if self.engine == "loop":
                return self._loop(arguments)
            if excluded:
                arguments = kind(args, kwargs, excluded)
            if plannable and planned is None:
                planned = self._planned(arguments, key)
        if planned is None:
            return self._fold(arguments, key)
        leaves, spec = planned
        return [*(self._unfolded(leaf, arguments.batch_size) for leaf in leaves), spec]

    @staticmethod
    def _key(arguments: Arguments, training: bool) -> tuple[Any, ...]:
        return arguments.signature(), training, torch.is_grad_enabled()

    def _can_plan(self, arguments: Arguments, rows: int) -> bool:
        whole = self.cap.asked is None or rows <= self.cap.asked
        return whole and arguments.plain() and can_plan(self.backend, arguments.tensors, self.network)

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
            return self.plans.make(arguments.plan_key(), whole, member, arguments.tensors, expected)
        return None

    def evaluate_drawn(self, args: tuple[Any, ...], kwargs: dict[str, Any], members: Tensor, training: bool) -> Any:
        """Run for each sample only its member, ``members`` int64 [B] on the CPU; return what a member returns."""
        arguments = Arguments(args, kwargs)
        eager = not torch.compiler.is_compiling() and not _capturing()
        plannable = eager and self.engine == "fold" and len(members) > 0 and self._can_plan(arguments, len(members))
        plan_key = ("drawn", arguments.plan_key()) if plannable else None
        excluded = self._dealt.get(plan_key)
        if excluded is None:
            excluded = self._established(args, kwargs, training)[0] if self.engine == "fold" else frozenset()
        if excluded:
            arguments = Arguments(args, kwargs, excluded)
        if self.engine == "loop":
            return run_drawn(self._call, arguments, members)
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

    def _planned_drawn(self, arguments: Arguments, members: Tensor, plan_key: Any, training: bool) -> Any:
        """Run the plan of a call whose samples go to one member each, whichever; none where there is no plan."""
        order, offsets = grouped(members, self.num_members)
        dealt = arguments.selected(order)
        inputs = [*dealt.tensors, offsets, members.index_select(0, order)]

        def whole(tensors: list[Tensor]) -> Any:
            return self._dealt_pass(dealt.with_tensors(tensors[:-2]), *tensors[-2:])

        def member(tensors: list[Tensor]) -> Any:
            return self._call(int(tensors[-1][0]), *dealt.with_tensors(tensors[:-2]).call)

        found = self.plans.run(plan_key, inputs)
        if found is None and self.cap.holds_recording(self._key(arguments, training), len(members)):
            with suppress_out_of_memory():
                found = self.plans.make(plan_key, whole, member, inputs, dealt=True)
        if found is None:
            return None
        leaves, spec = found
        return joined([pytree.tree_unflatten(leaves, spec)], order)

    def _established(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        kind: Callable[..., Arguments] = Arguments,
        plannable: bool = False,
    ) -> tuple[frozenset[int], tuple[list[Tensor], Any] | None]:
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
        arguments = kind(args, kwargs)
        key, total = self._key(arguments, training), self.num_members * arguments.batch_size
        found = self._checked.get((key, self.cap.rows(key, total) < total))
        if found is None:
            found, planned = self._first(args, kwargs, training, kind, plannable)
            self._called = True
            if planned is not None:  # the fold itself was not held against the loop, and is where a plan cannot serve
                return found, planned
            self._checked[key, self.cap.rows(key, total) < total] = found
        return found, None

    def _call(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_member(self.skeleton, member_tensors(self.network, k), args, kwargs)

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

    # The first pass of a signature

    def _first(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        kind: Callable[..., Arguments],
        plannable: bool,
    ) -> tuple[frozenset[int], tuple[list[Tensor], Any] | None]:
        """Establish where the batch is, and check the plan or the fold against the loop; fall back where they part.

        Of the loop only the members' outputs are held meanwhile.
        """
        arguments = kind(args, kwargs)
        key = self._key(arguments, training)
        args_0, kwargs_0 = arguments.of_member(0)
        recording = Recording()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), buffers_kept(self.network):
            expected: list[list[Tensor]] = []
            around: AbstractContextManager[None] = recording.of(self.skeleton)
            for k in range(self.num_members):
                with around:
                    output = self._call(k, *arguments.of_member(k))
                expected.append([x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])
                del output
                around = self._measuring(arguments, key, recording, expected[0]) if k == 0 else nullcontext()
            if self.num_members == 1 and not isinstance(around, nullcontext):
                with around:
                    self._call(0, args_0, kwargs_0)
            if plannable:
                rows, batch = self.num_members * arguments.batch_size, arguments.batch_size
                planned = self._planned(
                    arguments, key, expected, partial(establishing, self.network, recording, rows, batch)
                )
                if planned is not None:
                    return frozenset(), planned
            problem = None
            for attempt in range(_MAX_REPAIRS):
                problem, error = self._attempt(arguments, expected, recording, key)
                if problem is None:
                    return frozenset(set(kind(args, kwargs).batched) - set(arguments.batched)), None
                if error == _DIFFERS and attempt == 0 and self._random(args_0, kwargs_0):
                    break  # before anything is looped for it
                if attempt == 0 and len(arguments.batched) > 1:
                    excluded = establish_excluded(lambda a, k: self._call(0, a, k), args_0, kwargs_0)
                    if excluded:
                        arguments = kind(args, kwargs, excluded)
                        continue
                if not self._repair(arguments, error, key):
                    break
            if self._random(args_0, kwargs_0):
                self.why = "members are random in this mode, so the fold was not checked against the loop"
                return frozenset(), None
        self.engine = "loop"
        self.why = f"the fold disagreed with the loop: {problem}"
        warnings.warn(f"fastens: members are evaluated one by one, because {self.why}", stacklevel=5)
        return frozenset(), None

    def _measuring(
        self, arguments: Arguments, key: Any, recording: Recording, outputs: list[Tensor]
    ) -> AbstractContextManager[None]:
        """What the next member's pass runs in: a measurement of memory where that is needed."""
        least = recording.num_elements * max((x.element_size() for x in outputs), default=0)
        device, batch = arguments.batch.device, arguments.batch_size
        wanted = not self._differentiates(arguments, key) and self.cap.wants_measure(
            key, self.num_members, batch, least, device
        )
        return self.cap.measuring(key, batch) if wanted else nullcontext()

    def _attempt(
        self, arguments: Arguments, expected: list[list[Tensor]], recording: Recording, key: Any
    ) -> tuple[str | None, str]:
        self.rows.probing = True
        try:
            leaves = self._establishing_fold(arguments, recording, key)
        except Exception as error:
            return f"{type(error).__name__}: {error}", str(error)
        finally:
            self.rows.probing = False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for i, stack in enumerate(tensors):
            for k in range(self.num_members):
                error = relative_error(stack[k], expected[k][i])
                if not error <= tolerance_for(expected[k][i]):
                    return f"relative error {error:.1e} in member {k}", _DIFFERS
        return None, ""

    def _establishing_fold(self, arguments: Arguments, recording: Recording, key: Any) -> list[Any]:
        """Fold, and establish where each module's batch is: in that pass, or in a smaller one before it if capped."""
        batch = arguments.batch_size
        total = self.num_members * batch
        rows = self.cap.rows(key, total)
        # Where both passes are as large, every dimension is. With one member or row, nothing needs to be dealt out.
        if rows == total:
            with establishing(self.network, recording, total, batch) if total > batch else nullcontext():
                *leaves, _ = self._fold(arguments, key)
            if self.cap.rows(key, total) == total:
                return leaves
            return self._establishing_fold(arguments, recording, key)
        rows = min(rows, 3 if batch == 2 else 2)  # few, and not as many as the member's own pass has
        if rows > 1 and self._kept_together(batch) == 1:
            offsets = (torch.arange(self.num_members + 1) * batch).clamp(max=rows)
            with establishing(self.network, recording, rows, batch):
                self._pass(arguments, arguments.fold_rows(0, rows), offsets)
        *leaves, _ = self._fold(arguments, key)
        return leaves

    def _repair(self, arguments: Arguments, why: str, key: Any) -> bool:
        """Loop the module in which fold and loop part; return whether there was one to loop."""
        total = self.num_members * arguments.batch_size
        if self.cap.rows(key, total) < total:  # in several passes it is not looked for
            return False
        path = first_parting(
            self.network,
            lambda: self._fold(arguments, key),
            lambda k: self._call(k, *arguments.of_member(k)),
            self.skeleton,
            self.num_members,
        )
        module = folded_modules(self.network).get(path) if path else None
        if module is None or module.looped is not None:
            return False
        module.looped = f"folded, {why}"
        return True

    def _differentiates(self, arguments: Arguments, key: Any) -> bool:
        tensors = (*self.network.parameters(), *arguments.tensors)
        return key[-1] and any(x.requires_grad for x in tensors)

    def _random(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        first, second = (pytree.tree_leaves(self._call(0, args, kwargs)) for _ in range(2))
        return any(isinstance(a, Tensor) and relative_error(a, b) > 0 for a, b in zip(first, second, strict=True))

    def verify(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """The largest relative error of a folded pass against the loop."""
        with torch.no_grad():
            engine, self.engine = self.engine, "fold"
            try:
                *folded, _ = self.evaluate(args, kwargs, self.network.training)
            finally:
                self.engine = engine
            *looped, _ = self._loop(Arguments(args, kwargs))
        pairs = [(a, b) for a, b in zip(folded, looped, strict=True) if isinstance(b[0], Tensor)]
        return max((relative_error(a[k], x) for a, b in pairs for k, x in enumerate(b)), default=0.0)

    def report(self, backend: str) -> Report:
        """What each module that owns tensors got."""
        layers = layer_reports(self.network, self.num_members, self.why if self.engine == "loop" else None)
        plans = self.plans
        return Report(self.engine, self.num_members, self.why, layers, plans.kinds, plans.why_not, plans.num_bytes)


def _joined(parts: list[tuple[list[Any], Any]]) -> tuple[list[Any], Any]:
    """The leaves of several passes, one after the other in the batch, and their structure."""
    (first, spec), *others = parts
    if not others:
        return first, spec
    columns = zip(*(leaves for leaves, _ in parts), strict=True)
    return [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns], spec


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
