"""Rows that are evaluated by one member each: those that a rule draws, and those that were assigned."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.adaptive import refuse_adaptive
from fastens.draws import Assignment, Evaluation, assignment_of
from fastens.engine.arguments import Arguments
from fastens.engine.dealing import run_drawn
from fastens.engine.guards import refuse_tracers
from fastens.engine.row_by_row import each_row
from fastens.outputs import columns


class ByRows(nn.Module):
    """The part of an ensemble that evaluates one member for each row."""

    @property
    def _fresh(self: Any) -> bool:
        """Whether every evaluation draws numbers of its own."""
        return self._engine is not None and self._engine.kind.fresh

    def _drawn(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate, for each sample, only the member drawn for it."""
        arguments = self._arguments(args, kwargs)
        evaluation = self._begin(arguments)
        return self._by_rows(arguments, self._draws.members(self.rule, evaluation, arguments.batch_size))

    def _evaluated_by(self: Any, assigned: Assignment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._arguments(args, kwargs)
        if self.rule.random:
            self._begin(arguments)
        return self._by_rows(arguments, assigned.of_batch(arguments.batch_size))

    def _by_rows(self: Any, arguments: Arguments, members: Tensor) -> Any:
        if self._engine is not None:
            return self._engine.evaluate_drawn(arguments, members)
        run = functools.partial(run_drawn, self._call_module)
        *leaves, spec = each_row(self.network, arguments, lambda x, rows: columns([run(x, members[rows])]))
        return pytree.tree_unflatten([leaf[0] for leaf in leaves], spec)

    def _begin(self: Any, arguments: Arguments) -> Evaluation:
        """Start an evaluation; what it draws depends on its number, and on the trajectory's seed where there is one.

        A call is one evaluation, whoever asks first.
        """
        if arguments.begun is not None:
            return arguments.begun
        refuse_tracers()  # a graph would repeat what is drawn
        evaluation = arguments.begun = self._draws.begin(arguments.members_batch)
        arguments.evaluation = evaluation.seed, evaluation.number
        arguments.num_samples = evaluation.num_samples
        arguments.samples = evaluation.rows(arguments.batch_size)
        if self._fresh:
            refuse_adaptive(*self._engine.kind.drawn_anew)
        return evaluation

    def trajectory(
        self: Any,
        batch_size: int,
        generator: torch.Generator | int | None = None,
        *,
        samples: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Scope of one run of a sampler: ``mixture`` draws one member per sample for all of it.

        Inside it ``alternating`` draws, and fresh dropout masks, are reproducible from the generator. Rows i, i+B,
        i+2B, ... of a guided batch are one sample and get the same member. Outside it, a batch that repeats itself is
        taken for a guided one (a comparison, which on a GPU waits for the batch).

        Args:
            batch_size: samples in the trajectory, B.
            generator: read once, here; or a seed; none for torch's global generator.
            samples: their numbers, int64 [B], on which, and the seed, what is drawn for each depends: so many samples
                in several batches get what they get in one. None for 0 to B - 1.

        Raises:
            RuntimeError: a trajectory is already in progress.
            ValueError: a batch_size below one; numbers of another shape or dtype, or below zero.
        """
        return self._draws.trajectory(batch_size, generator, self.rule, samples)

    def assigned(
        self: Any,
        members: Tensor | Sequence[int] | None = None,
        *,
        per_member: int | None = None,
        guidance: int | None = None,
    ) -> AbstractContextManager[None]:
        """Scope in which each row is evaluated by its own member, whatever the rule, at the price of one member a row.

        Rows i, i+B, i+2B, ... of a guided batch are one sample. It is this thread's, or task's, alone: a generator that
        yields inside, and is resumed by another, finds no members assigned there, and is told so only if it ends there.

        Args:
            members: int64 [B], the member of each row; or a sequence of integers.
            per_member: N, for K N rows in the order of the members, in place of ``members``.
            guidance: rows of a guided batch that are one sample: batches have B or guidance B rows; none for any.

        Raises:
            TypeError: both or neither; another dtype than int64.
            ValueError: a member that there is not, no rows, other rows than the trajectory's; in a call, another batch.
            RuntimeError: rows have members already, or a rule draws them; in a call, inside ``torch.compile``.
        """
        return self._draws.assigned(assignment_of(members, per_member, guidance, self.num_members), self.rule)
