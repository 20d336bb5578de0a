"""Which trajectory and evaluation an ensemble is in, which rows are one sample, and the members drawn for them."""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastens import rules
from fastens.adaptive import refuse_adaptive
from fastens.ops._scores import seed_from
from fastens.ops.draw_members import draw_members


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as random numbers depend on it.

    Attributes:
        seed: of the trajectory; none outside one.
        number: 1 for the first evaluation of a trajectory, or the first outside one.
        num_samples: n; row r of the batch belongs to sample r % n, as guidance repeats the batch.
    """

    seed: int | None
    number: int
    num_samples: int


@dataclass
class _Trajectory:
    """A run of a sampler in one context: a thread, or a task."""

    seed: int
    batch_size: int
    evaluations: int = 0


# By ensemble; of a context, so that no thread or task is in the trajectory of another.
_TRAJECTORIES: contextvars.ContextVar[dict[int, _Trajectory]] = contextvars.ContextVar("trajectories", default={})  # noqa: B039


class Draws:
    """The random state of one ensemble.

    Neither the noise level nor the number of calls says where a trajectory begins or a step ends: second-order solvers
    evaluate twice in a step, and churn raises the noise level. So the caller says it, with :meth:`trajectory`.
    """

    def __init__(self, num_members: int) -> None:
        self.num_members = num_members
        self._evaluations_outside = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Draws, (self.num_members,)

    @contextmanager
    def trajectory(self, batch_size: int, generator: torch.Generator | int | None) -> Iterator[None]:
        """Scope of one trajectory; see :meth:`fastens.Ensemble.trajectory`."""
        if self._trajectory() is not None:
            raise RuntimeError("a trajectory of this ensemble is already in progress; leave it before the next one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least one sample")
        seed = generator if isinstance(generator, int) else seed_from(generator)
        token = _TRAJECTORIES.set({**_TRAJECTORIES.get(), id(self): _Trajectory(seed, batch_size)})
        try:
            yield
        finally:
            _TRAJECTORIES.reset(token)

    def _trajectory(self) -> "_Trajectory | None":
        return _TRAJECTORIES.get().get(id(self))

    def begin(self, x: Tensor) -> Evaluation:
        """Start an evaluation of the batch ``x`` [B, ...].

        Raises:
            ValueError: a batch that is not a multiple of the trajectory's.
        """
        batch, current = x.shape[0], self._trajectory()
        if current is None:
            with self._lock:
                self._evaluations_outside += 1
                number = self._evaluations_outside
            return Evaluation(None, number, batch // _repetitions(x))
        if batch % current.batch_size:
            raise ValueError(
                f"the batch has {batch} rows, expected a multiple of the trajectory's batch_size {current.batch_size}"
            )
        current.evaluations += 1
        return Evaluation(current.seed, current.evaluations, current.batch_size)

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
            drawn = draw_members(evaluation.seed, number, self.num_members, evaluation.num_samples)
        return drawn.repeat(batch // max(evaluation.num_samples, 1))


def _repetitions(x: Tensor) -> int:
    """How often a batch repeats itself: guidance evaluates each sample twice or three times, in blocks."""
    batch = x.shape[0]
    for times in (2, 3):
        if batch and batch % times == 0:
            first, *others = x.detach().chunk(times)
            if all(torch.equal(first, other) for other in others):
                return times
    return 1
