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
from fastens.plan.memory import Constants
from fastens.plan.plan import Plan
from fastens.plan.record import NotLowerable, NotRecordable, record

_MOST_PLANS = 16  # signatures; beyond them the oldest is dropped
_MOST_REFUSALS = 64
_DTYPES = {torch.float32, torch.bfloat16}
_OTHER_INPUT = 0.875  # a plan is checked on inputs that it was not recorded with: these times the recorded ones

Leaves = list[Tensor]


class Plans:
    """The programs of one folded network, by signature of the call.

    Attributes:
        why_not: why the last signature that got no plan has none, empty where all have one.
    """

    def __init__(self, network: nn.Module, num_members: int) -> None:
        self._network = network
        self._hooks = [hooks for m in network.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
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
        if found is None or any(self._hooks) or self._state() != self._weights:
            return None
        plan, spec = found
        return plan.run(inputs), spec

    def refused(self, key: Any) -> bool:
        """Whether a signature was found to have no plan, or can have none while hooks want to be called."""
        return any(self._hooks) or (key in self._refused and self._state() == self._weights)

    def refuse(self, key: Any, why: str) -> None:
        """Keep that a signature has no plan."""
        self._refused.add(key)
        self.why_not = why

    def make(
        self, key: Any, whole: Callable[[Leaves], Any], member: Callable[[Leaves], Any], inputs: Leaves
    ) -> tuple[Leaves, Any]:
        """Record a folded pass and run its plan, so that the first result of a signature is no other than the next.

        The plan is checked against the recorded pass, and on other inputs against the first member: a value that was
        taken from the recorded ones would show there.

        Args:
            key: the signature.
            whole: the folded pass as a function of the tensors of the call.
            member: the first member likewise.
            inputs: the tensors of the call.

        Returns:
            The leaves of the folded output and their structure: of the plan, or where there can be none, of the pass.
        """
        found = self.attempt(key, whole, member, inputs)
        return pytree.tree_flatten(whole(inputs)) if found is None else found

    def attempt(
        self,
        key: Any,
        whole: Callable[[Leaves], Any],
        member: Callable[[Leaves], Any],
        inputs: Leaves,
        seen: Callable[[Leaves], Leaves] = list,
    ) -> tuple[Leaves, Any] | None:
        """Make a plan as :meth:`make` does, and run it; none where there can be none.

        Args:
            key: the signature.
            whole: the pass as a function of the tensors of the call.
            member: what ``seen`` shows of the plan's outputs, from the first member.
            inputs: the tensors of the call.
            seen: what of the plan's outputs is compared.
        """
        if self._state() != self._weights:
            self.clear()
            self._weights = self._state()
        refused = key in self._refused or len(self._refused) >= _MOST_REFUSALS
        if refused or any(self._hooks):  # hooks want to be called
            return None
        other = {t.dtype for t in self._tensors if t.is_floating_point()} - _DTYPES
        if other:
            return self.refuse(key, f"the network has {', '.join(map(str, other))}")
        try:
            recording, result = record(lambda: whole(inputs), inputs)
            leaves, spec = pytree.tree_flatten(result)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise NotRecordable("an output is no tensor of the batch")
            plan = Plan(recording, self._num_members, self._constants)
            outputs = plan.run(inputs)
            _check(outputs, leaves)
            others = [x * _OTHER_INPUT if x.is_floating_point() else x for x in inputs]
            own = [x for x in pytree.tree_leaves(member(others)) if isinstance(x, Tensor)]
            _check([x[: len(y)] for x, y in zip(seen(plan.run(others)), own, strict=True)], own)
        except (NotRecordable, NotLowerable) as error:
            return self.refuse(key, str(error))
        except RuntimeError as error:  # the network wants a layout that a recording does not give it
            return self.refuse(key, f"{type(error).__name__} while recording: {error}")
        self._plans[key] = (plan, spec)
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return outputs, spec

    def _state(self) -> Any:
        """What changes with the weights, as far as torch tells: versions, and where the first one is."""
        if not self._tensors:
            self._tensors = [*self._network.parameters(), *self._network.buffers()]
        first = self._tensors[0]
        return sum([t._version for t in self._tensors]), first.data_ptr(), first.dtype


def _check(ours: Leaves, theirs: Leaves) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error = relative_error(a, b)
        if not error <= tolerance_for(b):
            raise NotLowerable(f"the plan is {error:.1e} from the members")


def can_plan(backend: str, arguments: Leaves, network: nn.Module) -> bool:
    """Whether a call may run as a program: natively on the CPU, in evaluation mode, without derivatives."""
    return (
        backend in ("auto", "native")
        and not torch.is_grad_enabled()
        and not network.training
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" for x in arguments)
        and run_program.available()
    )
