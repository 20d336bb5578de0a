"""Plans of an ensemble: which calls run as a recorded program, and when that program is no longer true."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.fold.check import relative_error, tolerance_for
from fastens.ops import run_program
from fastens.plan.emit import NotLowerable
from fastens.plan.memory import Constants
from fastens.plan.plan import Plan
from fastens.plan.record import NotRecordable, record

_MOST_PLANS = 16  # signatures; beyond them the oldest is dropped
_MOST_REFUSALS = 64
_OTHER_INPUT = 0.875  # a plan is checked on inputs that it was not recorded with: these times the recorded ones

Leaves = list[Tensor]


class Plans:
    """The programs of one folded network, by signature of the call.

    Attributes:
        why_not: why the last signature that got no plan has none, empty where all have one.
    """

    def __init__(self, network: nn.Module, num_members: int) -> None:
        self._network = network
        self._num_members = num_members
        self.clear()

    def clear(self) -> None:
        """Drop all plans and the packed weights."""
        self._plans: OrderedDict[Any, tuple[Plan, Any]] = OrderedDict()
        self._refused: set[Any] = set()
        self._constants = Constants()
        self._weights: Any = None
        self._tensors: list[Tensor] = []
        self.why_not = ""

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights and of all arenas."""
        return self._constants.num_bytes + sum(plan.num_bytes for plan, _ in self._plans.values())

    @property
    def kinds(self) -> list[dict[str, int]]:
        """How many steps of each kind each plan has."""
        return [plan.kinds for plan, _ in self._plans.values()]

    def run(self, key: Any, inputs: Leaves) -> tuple[Leaves, Any] | None:
        """Run the plan of a signature.

        Args:
            key: the signature; it covers everything that is not a tensor.
            inputs: the tensors of the call.

        Returns:
            The leaves of the folded output [K*B, ...] in memory of their own and their structure, or none without plan.
        """
        found = self._plans.get(key)
        if found is None or self._state() != self._weights:
            return None
        plan, spec = found
        return plan.run(inputs), spec

    def make(self, key: Any, run: Callable[[Leaves], Any], inputs: Leaves) -> Any:
        """Run a folded pass eagerly; record it, and keep its plan where that proves right.

        Args:
            key: the signature.
            run: the folded pass as a function of the tensors of the call.
            inputs: the tensors of the call.

        Returns:
            What the pass returned.
        """
        state = self._state()
        if state != self._weights:
            self.clear()
            self._weights = state
        if key in self._refused or len(self._refused) >= _MOST_REFUSALS:
            return run(inputs)
        try:
            recording, result = record(lambda: run(inputs), inputs)
            leaves, spec = pytree.tree_flatten(result)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise NotRecordable("an output is no tensor of the batch")
            plan = Plan(recording, self._num_members, self._constants)
            self._check(plan, inputs, leaves)
            others = [x * _OTHER_INPUT if x.is_floating_point() else x for x in inputs]
            self._check(plan, others, pytree.tree_leaves(run(others)))
        except (NotRecordable, NotLowerable) as error:
            self._refused.add(key)
            self.why_not = str(error)
            return run(inputs)
        except RuntimeError as error:  # the network wants a layout that a recording does not give it
            self._refused.add(key)
            self.why_not = f"{type(error).__name__} while recording: {error}"
            return run(inputs)
        self._plans[key] = (plan, spec)
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return result

    @staticmethod
    def _check(plan: Plan, inputs: Leaves, expected: Leaves) -> None:
        for ours, theirs in zip(plan.run(inputs), expected, strict=True):
            error = relative_error(ours, theirs)
            if not error <= tolerance_for(theirs):
                raise NotLowerable(f"the plan is {error:.1e} from the folded pass")

    def _state(self) -> Any:
        """What changes with the weights, as far as torch tells: versions, and where the first one is."""
        if not self._tensors:
            self._tensors = [*self._network.parameters(), *self._network.buffers()]
        first = self._tensors[0]
        return sum([t._version for t in self._tensors]), first.data_ptr(), first.dtype


def can_plan(backend: str, arguments: Leaves, network: nn.Module) -> bool:
    """Whether a call may run as a program: on the CPU, in evaluation mode, without derivatives, by the native library."""
    return (
        backend in ("auto", "native")
        and not torch.is_grad_enabled()
        and not network.training
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" for x in arguments)
        and run_program.available()
    )
