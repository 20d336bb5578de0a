"""The plan of a signature, and what it rests on beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastens.engine.leaves import Leaves
from fastens.engine.states import State
from fastens.network.weights import Weights
from fastens.trace.record import NotRecordable

if TYPE_CHECKING:
    from fastens.engine.numbers import Numbers
    from fastens.fold.dropouts import Dropouts
    from fastens.plan.cpu.plan import Plan
    from fastens.plan.gpu.plan import LaunchPlan

Tensors = list[Tensor]


class OtherNumbers(NotRecordable):
    """A plan takes numbers of one type, and Python makes another of those of a call."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a plan is held against before it is used; as :meth:`fastens.engine.planned.Plans.make` is given it."""

    member: Callable[..., Tensors | None]
    inputs: Tensors
    expected: list[Tensors] | None
    dealt: bool
    seen: Callable[[Tensors], Tensors]
    dropouts: Dropouts
    numbers: Numbers | None

    @property
    def drawn(self) -> int:
        """Which input fresh masks depend on: behind it are the samples of the rows, and where rows go to one member."""
        return len(self.inputs) - (4 if self.dealt else 2)


@dataclasses.dataclass
class Entry(State):
    """The state of a planned signature: its plan, what makes members' outputs of the plan's, and inputs of numbers.

    Attributes:
        plan: the recorded program.
        leaves: what its outputs are.
        numbers: those of the call that are inputs; none where it has them as they were.
        trace: what it was recorded from, step by step.
        constants: what else it rests on: tensors that are no weights, in attributes, lists, closures and globals.
        calls: how often it ran.
    """

    name: ClassVar[str] = "planned"
    plan: Plan | LaunchPlan
    leaves: Leaves
    numbers: Numbers | None
    trace: list[str]
    constants: Weights | None = None
    calls: int = 0

    def __post_init__(self) -> None:
        """Keep what the constants are now."""
        self._state = None if self.constants is None else self.constants.state()

    @property
    def holds(self) -> bool:
        """Whether the constants are as they were, and ask for no gradients."""
        if self.constants is None:
            return True
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in self.constants.tensors)
        return not wanted and self.constants.state() == self._state

    def run(self, inputs: Tensors, values: Mapping[int, float], weights: list[float] | None = None) -> Tensors:
        """Run the program on the tensors of a call and its numbers by position.

        Raises:
            OtherNumbers: Python makes something else of these numbers than of those that it was recorded with.
        """
        made = [] if self.numbers is None else self.numbers.tensors(dict(values))
        if made is None:
            raise OtherNumbers("what Python makes of it is an error or of another type for another value")
        self.calls += 1
        inputs = [*inputs, *made]
        run: Any = self.plan.run  # launches alone are asked for sums
        return run(inputs) if weights is None else run(inputs, weights)
