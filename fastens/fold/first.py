"""The first pass of a kind of call: where the batch is, and whether plan or fold give what the members do."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.arguments import Arguments, establish_excluded
from fastens.fold.check import Recording, buffers_kept, establishing, first_parting, relative_error, tolerance_for
from fastens.fold.memory_cap import is_out_of_memory
from fastens.fold.network import folded_modules
from fastens.plan.record import record
from fastens.plan.sketch import sketched

if TYPE_CHECKING:
    from fastens.fold.engine import FoldEngine

_MAX_REPAIRS = 8  # modules looped one after the other before the whole network is
_DIFFERS = "the result differs from the members'"

# Leaves that only look like the batch; and the leaves of the plan's outputs and their structure, where one was made.
Established = tuple[frozenset[int], tuple[list[Tensor], Any] | None]


def established_by_sketch(engine: FoldEngine, arguments: Arguments) -> bool:
    """Establish where the batch is in a pass of members without its arithmetic; return whether that was done."""
    shapes, rows = Recording(), engine.num_members * arguments.batch_size
    with shapes.of(engine.skeleton):
        engine._call(0, *arguments.of_member(0))
    try:
        with establishing(engine.network, shapes, rows, arguments.batch_size):
            record(lambda: engine._pass(arguments, None, None), arguments.tensors, sketched)
    except Exception as error:  # whatever it is, the pass itself shows it
        if is_out_of_memory(error):
            raise
        return False
    return True


class FirstPass:
    """Holds the plan or the fold of a call against the members run one by one, and falls back where they part.

    Args:
        engine: whose call it is.
        arguments: of the call.
        key: what tells this kind of call from others.
        plannable: whether a plan is wanted.
    """

    def __init__(self, engine: FoldEngine, arguments: Arguments, key: Any, plannable: bool) -> None:
        self._engine = engine
        self._arguments = arguments
        self._key = key
        self._plannable = plannable
        self._recording = Recording()
        self._expected: list[list[Tensor]] = []  # the members' outputs: all that is held of the loop meanwhile

    @property
    def _rows(self) -> int:
        return self._engine.num_members * self._arguments.batch_size

    def run(self) -> Established:
        """Establish where the batch is, and check; return that, and the plan's outputs where one was made."""
        engine, given = self._engine, self._arguments
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), buffers_kept(engine.network):
            self._run_members()
            if self._plannable:
                batch_size = given.batch_size
                around = partial(establishing, engine.network, self._recording, self._rows, batch_size)
                planned = engine._planned(given, self._key, self._expected, around)
                if planned is not None:
                    return frozenset(), planned
            problem = self._repaired()
            if problem is None:
                return frozenset(set(given.batched) - set(self._arguments.batched)), None
            if self._random():
                engine.why = "members are random in this mode, so the fold was not checked against the loop"
                return frozenset(), None
        engine.engine = "loop"
        engine.why = f"the fold disagreed with the loop: {problem}"
        warnings.warn(f"fastens: members are evaluated one by one, because {engine.why}", stacklevel=6)
        return frozenset(), None

    def _run_members(self) -> None:
        """Run the members one by one: what each gives, the shapes inside the first, the memory of the second."""
        engine = self._engine
        around: AbstractContextManager[None] = self._recording.of(engine.skeleton)
        for k in range(engine.num_members):
            with around:
                output = engine._call(k, *self._arguments.of_member(k))
            self._expected.append([x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])
            del output
            around = self._measuring() if k == 0 else nullcontext()
        if engine.num_members == 1 and not isinstance(around, nullcontext):
            with around:
                engine._call(0, *self._arguments.of_member(0))

    def _measuring(self) -> AbstractContextManager[None]:
        """What the next member's pass runs in: a measurement of memory where that is needed."""
        engine, arguments, outputs = self._engine, self._arguments, self._expected[0]
        least = self._recording.num_elements * max((x.element_size() for x in outputs), default=0)
        device, batch = arguments.batch.device, arguments.batch_size
        wanted = not self._differentiates() and engine.cap.wants_measure(
            self._key, engine.num_members, batch, least, device
        )
        return engine.cap.measuring(self._key, batch) if wanted else nullcontext()

    def _differentiates(self) -> bool:
        tensors = (*self._engine.network.parameters(), *self._arguments.tensors)
        return self._key[-1] and any(x.requires_grad for x in tensors)

    def _repaired(self) -> str | None:
        """Fold, looping what does not fold; return what still parts from the members, none where nothing does."""
        problem = None
        for attempt in range(_MAX_REPAIRS):
            problem, error = self._attempt()
            if problem is None or (error == _DIFFERS and attempt == 0 and self._random()):
                break  # before anything is looped for it
            if attempt == 0 and len(self._arguments.batched) > 1:
                run_first = partial(self._engine._call, 0)
                excluded = establish_excluded(run_first, *self._arguments.of_member(0))
                if excluded:
                    self._arguments = self._arguments.excluding(excluded)
                    continue
            if not self._repair(error):
                break
        return problem

    def _attempt(self) -> tuple[str | None, str]:
        rows = self._engine.rows
        rows.probing = True
        try:
            leaves = self._fold()
        except Exception as error:
            return f"{type(error).__name__}: {error}", str(error)
        finally:
            rows.probing = False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for i, stack in enumerate(tensors):
            for k, theirs in enumerate(self._expected):
                error = relative_error(stack[k], theirs[i])
                if not error <= tolerance_for(theirs[i], self._engine.network):
                    return f"relative error {error:.1e} in member {k}", _DIFFERS
        return None, ""

    def _fold(self) -> list[Any]:
        """Fold, and establish where each module's batch is: in that pass, or in a smaller one before it if capped."""
        engine, batch, total = self._engine, self._arguments.batch_size, self._rows
        rows = engine.cap.rows(self._key, total)
        # Where both passes are as large, every dimension is. With one member or row, nothing needs to be dealt out.
        if rows == total:
            establish = establishing(engine.network, self._recording, total, batch)
            with establish if total > batch else nullcontext():
                *leaves, _ = engine._fold(self._arguments, self._key)
            return leaves if engine.cap.rows(self._key, total) == total else self._fold()
        rows = min(rows, 3 if batch == 2 else 2)  # few, and not as many as the member's own pass has
        if rows > 1 and engine._kept_together(batch) == 1:
            offsets = (torch.arange(engine.num_members + 1) * batch).clamp(max=rows)
            with establishing(engine.network, self._recording, rows, batch):
                engine._pass(self._arguments, self._arguments.fold_rows(0, rows), offsets)
        *leaves, _ = engine._fold(self._arguments, self._key)
        return leaves

    def _repair(self, why: str) -> bool:
        """Loop the module in which fold and loop part; return whether there was one to loop."""
        engine, arguments = self._engine, self._arguments
        if engine.cap.rows(self._key, self._rows) < self._rows:  # in several passes it is not looked for
            return False
        path = first_parting(
            engine.network,
            lambda: engine._fold(arguments, self._key),
            lambda k: engine._call(k, *arguments.of_member(k)),
            engine.skeleton,
            engine.num_members,
        )
        module = folded_modules(engine.network).get(path) if path else None
        if module is None or module.looped is not None:
            return False
        module.looped = f"folded, {why}"
        return True

    def _random(self) -> bool:
        first, second = (pytree.tree_leaves(self._engine._call(0, *self._arguments.of_member(0))) for _ in range(2))
        return any(isinstance(a, Tensor) and relative_error(a, b) > 0 for a, b in zip(first, second, strict=True))
