"""Which trajectory and evaluation an ensemble is in, which rows are one sample, and the members that they have."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from fastens import rules
from fastens.adaptive import refuse_adaptive
from fastens.internal import output_by_rows
from fastens.ops._scores import seed_from
from fastens.ops.draw_members import draw_members
from fastens.reference.draw_members import members_of
from fastens.scopes import Blocks


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as random numbers depend on it.

    Attributes:
        seed: of the trajectory; none outside one.
        number: 1 for the first evaluation of a trajectory, or the first outside one.
        num_samples: n; row r of the batch belongs to sample r % n, as guidance repeats the batch.
        samples: the numbers of these, int64 [n] on the CPU; none for 0 to n - 1.
    """

    seed: int | None
    number: int
    num_samples: int
    samples: Tensor | None = None

    def rows(self, batch: int) -> Tensor | None:
        """The number of each row's sample, int64 [batch]; none where they are 0 to n - 1."""
        return None if self.samples is None else self.samples.repeat(batch // max(self.num_samples, 1))


@dataclass
class _Trajectory:
    """A run of a sampler in one context: a thread, or a task."""

    seed: int
    batch_size: int
    samples: Tensor | None
    evaluations: int = 0


@dataclass(frozen=True)
class Assignment:
    """The member of each row of a batch.

    Attributes:
        members: int64 [B] on the CPU.
        guidance: of how many rows of a guided batch, which are one sample, each member is; none for any number.
    """

    members: Tensor
    guidance: int | None = None

    def __len__(self) -> int:
        return len(self.members)

    def evaluate(self, ensemble: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate an ensemble, each row by its member."""
        return output_by_rows(ensemble, self, args, kwargs)

    def of_batch(self, batch: int) -> Tensor:
        """The member of each row of a batch, which guidance may repeat, int64 [batch].

        Raises:
            ValueError: a batch that is neither the assignment's nor a multiple that guidance makes of it.
        """
        rows, times = len(self), batch // len(self)
        if self.guidance is not None and batch not in (rows, rows * self.guidance):
            raise ValueError(
                f"the batch has {batch} rows, expected the {rows} that members are assigned to, or guidance="
                f"{self.guidance} times as many"
            )
        if batch % rows:
            raise ValueError(
                f"the batch has {batch} rows, expected a multiple of the {rows} that members are assigned to"
            )
        return self.members if times == 1 else self.members.repeat(times)


# By ensemble; of a context, so that no thread or task is in the trajectory, or has the members, of another.
_TRAJECTORIES: Blocks[_Trajectory] = Blocks("ens.trajectory")
_ASSIGNED: Blocks[Any] = Blocks("ens.assigned")


def assignment_of(members: Any, per_member: int | None, guidance: int | None, num_members: int) -> Assignment:
    """The members of rows; see :meth:`fastens.Ensemble.assigned`."""
    if guidance is not None:
        _check_count("guidance", guidance, "row of each sample in a batch")
    if (members is None) == (per_member is None):
        raise TypeError(
            "assigned: expected either members, the member of each row, or per_member=, rows of each member"
        )
    if per_member is not None:
        _check_count("per_member", per_member, "row of each member")
        return Assignment(torch.arange(num_members).repeat_interleave(per_member), guidance)
    return Assignment(numbers_of(members, num_members, "assigned"), guidance)


def _check_count(name: str, count: Any, what: str) -> None:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"assigned: {name} is a {type(count).__name__}, expected a number of rows")
    if count < 1:
        raise ValueError(f"assigned: {name} is {count}, expected at least one {what}")


def numbers_of(members: Any, num_members: int, where: str) -> Tensor:
    """Numbers of members, int64 [B] on the CPU.

    Raises:
        TypeError: another dtype.
        ValueError: none, or a member that there is not.
    """
    rows = members if isinstance(members, Tensor) else torch.tensor(members)
    if rows.dtype != torch.int64:
        raise TypeError(f"{where}: members is {rows.dtype}, expected int64: the member of each row")
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"{where}: members is {list(rows.shape)}, expected [B], the member of each of B rows")
    rows = rows.detach().to("cpu", copy=True)
    wrong = torch.nonzero((rows < 0) | (rows >= num_members)).flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where}: members[{wrong[0]}] is {int(rows[wrong[0]])}, expected 0 to {num_members - 1}, as there are "
            f"{num_members} members"
        )
    return rows


def _sample_numbers(samples: Tensor, batch_size: int) -> Tensor:
    """Numbers of a trajectory's samples, int64 [B] on the CPU."""
    if samples.dtype != torch.int64 or tuple(samples.shape) != (batch_size,):
        raise ValueError(
            f"trajectory: samples is {samples.dtype} {list(samples.shape)}, expected int64 [{batch_size}], the number "
            "of each sample"
        )
    samples = samples.detach().to("cpu", copy=True)
    if bool((samples < 0).any()):
        raise ValueError(f"trajectory: samples has {int(samples.min())}, expected numbers of at least 0")
    return samples


class Draws:
    """The random state of one ensemble.

    Neither the noise level nor the number of calls says where a trajectory begins or a step ends: second-order solvers
    evaluate twice in a step, and churn raises the noise level. So the caller says it, with :meth:`trajectory`.
    """

    def __init__(self, num_members: int, evaluations: int = 0) -> None:
        self.num_members = num_members
        self._evaluations_outside = evaluations
        self._assignments = 0  # in all contexts together
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Draws, (self.num_members, self._evaluations_outside)

    @contextmanager
    def trajectory(
        self, batch_size: int, generator: torch.Generator | int | None, rule: rules.Rule, samples: Tensor | None = None
    ) -> Iterator[None]:
        """Scope of one trajectory; see :meth:`fastens.Ensemble.trajectory`."""
        if self._trajectory() is not None:
            raise RuntimeError("a trajectory of this ensemble is already in progress; leave it before the next one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least one sample")
        self._check_nested(rule, self.assignment(), batch_size)
        samples = None if samples is None else _sample_numbers(samples, batch_size)
        seed = seed_from(generator)
        with _TRAJECTORIES.block(self, _Trajectory(seed, batch_size, samples)):
            yield

    @contextmanager
    def assigned(self, rows: Any, rule: rules.Rule) -> Iterator[None]:
        """Scope in which each row has its member; see :meth:`fastens.Ensemble.assigned`.

        Args:
            rows: their members; or a run of all members, whose ``evaluate`` stands for the ensemble.
            rule: of the ensemble.
        """
        if self.assignment() is not None:
            raise RuntimeError("members are already assigned to the rows; leave that scope before the next one")
        current = self._trajectory()
        self._check_nested(rule, rows, None if current is None else current.batch_size)
        yield from self._with_assignment(rows)

    @contextmanager
    def unassigned(self) -> Iterator[None]:
        """Scope in which the ensemble is evaluated as outside the assignment: what a run itself asks of it."""
        yield from self._with_assignment(None)

    def _with_assignment(self, rows: Any) -> Iterator[None]:
        with self._lock:
            self._assignments += 1
        try:
            with _ASSIGNED.block(self, rows):
                yield
        finally:
            with self._lock:
                self._assignments -= 1

    @staticmethod
    def _check_nested(rule: rules.Rule, rows: Any, batch_size: int | None) -> None:
        """Raise where an assignment and a trajectory contradict each other."""
        if rows is None or batch_size is None:
            return
        if rule.random:
            raise RuntimeError(
                f"rule {rule.name!r} draws members for a trajectory, and members are assigned to its rows; take one of "
                "the two, or ens.with_rule('mean')"
            )
        if isinstance(rows, Assignment) and len(rows) != batch_size:
            raise ValueError(f"the trajectory has {batch_size} samples, and members are assigned to {len(rows)}")

    @property
    def any_assigned(self) -> bool:
        """Whether members are assigned in some context: then a compiled graph asks outside of it in which."""
        return bool(self._assignments)

    def assignment(self) -> Any:
        """Return the members assigned to the rows in this context, None where there are none.

        Raises:
            RuntimeError: inside ``torch.compile``, where a context cannot be told.
        """
        if not torch.compiler.is_dynamo_compiling():
            return _ASSIGNED.of(self)
        if self._assignments:  # what a compiled graph rests on
            raise RuntimeError("members are assigned to rows, which a compiled ensemble cannot see; call it uncompiled")
        return None

    def _trajectory(self) -> "_Trajectory | None":
        return _TRAJECTORIES.of(self)

    def begin(self, x: Tensor) -> Evaluation:
        """Start an evaluation of the batch ``x`` [B, ...].

        Raises:
            ValueError: a batch that is not a multiple of the trajectory's.
            RuntimeError: inside ``torch.func.vmap``.
        """
        if any(each.key() == TransformType.Vmap for each in get_interpreter_stack() or ()):
            raise RuntimeError(
                "members or dropout masks are drawn in each call, and torch.func.vmap makes one call of many; call the "
                "ensemble on the whole batch"
            )
        batch, current, assigned = x.shape[0], self._trajectory(), self.assignment()
        if current is None:
            with self._lock:
                self._evaluations_outside += 1
                number = self._evaluations_outside
            return Evaluation(None, number, batch // _repetitions(x) if assigned is None else len(assigned))
        if batch % current.batch_size:
            raise ValueError(
                f"the batch has {batch} rows, expected a multiple of the trajectory's batch_size {current.batch_size}"
            )
        current.evaluations += 1
        return Evaluation(current.seed, current.evaluations, current.batch_size, current.samples)

    def members(self, rule: rules.Rule, evaluation: Evaluation, batch: int) -> Tensor:
        """The member of each row under a random rule, int64 [B] on the CPU.

        Raises:
            RuntimeError: ``mixture`` outside a trajectory, or ``alternating`` in an adaptive solver.
        """
        if rule.per_trajectory and evaluation.seed is None:
            raise RuntimeError(
                "rule 'mixture' draws one member per sample and trajectory; run the sampler inside "
                "`with ens.trajectory(batch_size, generator=g):`"
            )
        if rule.per_evaluation:
            refuse_adaptive(f"rule {rule.name!r} draws members", "use rule 'mixture' inside a trajectory")
        if evaluation.seed is None:
            drawn = draw_members(seed_from(None), 0, self.num_members, evaluation.num_samples)
        else:
            number = evaluation.number if rule.per_evaluation else 0
            samples = evaluation.samples
            if samples is None:
                drawn = draw_members(evaluation.seed, number, self.num_members, evaluation.num_samples)
            else:
                drawn = members_of(evaluation.seed, number, self.num_members, samples)
        return drawn.repeat(batch // max(evaluation.num_samples, 1))


def assigned_to(model: Any) -> Any:
    """Return the members assigned to a model's rows in this context, None where there are none."""
    draws = getattr(model, "_draws", None)
    return draws.assignment() if isinstance(draws, Draws) else None


def _repetitions(x: Tensor) -> int:
    """How often a batch repeats itself: guidance evaluates each sample twice or three times, in blocks."""
    batch = x.shape[0]
    for times in (2, 3):
        if batch and batch % times == 0:
            first, *others = x.detach().chunk(times)
            if all(torch.equal(first, other) for other in others):
                return times
    return 1
