"""The engine of an ensemble: which way a call of all members takes, and what follows where one fails."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from fastens import reproducible
from fastens.device import capturing
from fastens.engine import row_by_row
from fastens.engine.arguments import Arguments
from fastens.engine.calls import PlannedCall
from fastens.engine.derivatives import Disturbed
from fastens.engine.drawn import DrawnCall
from fastens.engine.first import FirstPass
from fastens.engine.folding import FoldedMembers
from fastens.engine.guards import refuse_tracers
from fastens.engine.kinds import PLAIN, MemberKind
from fastens.engine.masks import NothingDropped
from fastens.engine.memory_cap import is_out_of_memory
from fastens.engine.numbers import SeenNumbers
from fastens.engine.planned import Plans
from fastens.engine.states import UNKNOWN, Behaviour, States
from fastens.engine.transformed import in_trace, in_transform
from fastens.fold.callsite import counted_if_it_succeeds
from fastens.fold.stand_ins import number_of
from fastens.fold.tensor import NotFoldable
from fastens.fold.writes import WritesInput
from fastens.network.stacking import Stacked


class Engine(FoldedMembers):
    """Evaluates K members of one structure, by a plan, a pass of all, or one by one.

    Nothing of a call is kept here: what a pass needs travels with it, so that any number of threads may call.

    Args:
        stacked: their structure and stacks.
        num_members: K.
        settings: of the ensemble.
        originals: the members that were handed in, against which the first call is held; none where they are gone.
        kind: what members have for themselves.

    Attributes:
        states: what calls have shown of each signature.
        plans: the recorded programs.
        numbers: which numbers among the arguments vary from call to call.
        number: what a compiled graph finds the engine by.
        nested: how the outputs of the call that was traced last are nested; none before one was.
    """

    def __init__(
        self,
        stacked: Stacked,
        num_members: int,
        settings: dict[str, Any],
        originals: Any = None,
        kind: MemberKind = PLAIN,
    ) -> None:
        why = "asked for" if settings["engine"] != "auto" else "members agree in everything but their weights"
        behaviour = Behaviour(settings["engine"] == "loop", why, wrapped=kind.wrapped)
        members = stacked, num_members, kind, behaviour, originals
        super().__init__(*members, max_fold=settings["max_fold"], backend=settings["backend"])
        self.states = States()
        self.plans = Plans(self.network, num_members, self.backend, self.states, self.guards)
        self.numbers = SeenNumbers()
        self.number = number_of(self)
        self.nested: Any = None

    def refresh(self, state: bool = True) -> None:
        """Forget which signatures were checked, what they need of memory, the plans, and copies of Python state.

        Args:
            state: whether the Python state of members is copied anew as well.
        """
        if state:
            self._views.look()
        self.look()
        self.states.clear()
        self.rows.clear()
        self.cap.clear()
        self.plans.clear()
        self.originals = None

    def give_up(self, why: str) -> None:
        """Take the loop from now on, and say why."""
        self.behaviour.looped, self.behaviour.why = True, why
        self.unshare_all()
        self.plans.clear()
        warnings.warn(f"fastens: members are evaluated one by one, because {why}", stacklevel=7)

    def evaluate(self, arguments: Arguments, training: bool, method: str = "forward") -> list[Any]:
        """Run all members; return the leaves of their outputs, [K, ...] or a list of K, and the structure last.

        Args:
            arguments: of the call.
            training: the mode of the ensemble.
            method: what is called.

        Raises:
            RuntimeError: inside ``torch.jit.trace`` or ``make_fx``.
        """
        refuse_tracers()
        if reproducible.enabled() and not torch.compiler.is_compiling():
            return row_by_row.evaluate(self, arguments, training, method)
        return self.evaluate_at_once(arguments, training, method)

    def evaluate_at_once(self, arguments: Arguments, training: bool, method: str = "forward") -> list[Any]:
        """The same by whichever way is open first, whatever last bits depend on.

        The loop, where members are looped or somebody is to see what they call; a plan that there is; where the
        signature is unknown, its first call, which makes a plan or establishes the fold; else a plan that can be made
        now; else the fold.
        """
        if torch.compiler.is_compiling():  # an export, whose tensors are in the tables
            return in_trace(self, arguments, method)
        if torch.is_grad_enabled():
            self.check_frozen()
        if self.behaviour.looped:
            with self.turn():
                return self._by_code(arguments, training, method)
        if self.guards.observed():
            with self.turn():
                return in_transform(self, lambda call: self.loop(arguments, method, call))
        plannable = method == "forward" and self.can_plan(arguments)
        if plannable:
            planned = PlannedCall(self, arguments).run()
            if planned is not None:
                return planned
        with self.turn():
            return self._by_code(arguments, training, method, plannable)

    def _by_code(self, arguments: Arguments, training: bool, method: str, plannable: bool = False) -> list[Any]:
        """The same where code of the network or of members runs, in this thread's turn."""
        if self.behaviour.looped:  # another thread may have had its turn meanwhile
            self.guards.check_memory()
            return self.loop(arguments, method)
        if capturing():
            return self.fold(arguments, None, method)
        self.guards.check_memory()
        self.numbers.note(arguments)
        key = (method, arguments.signature(), training, torch.is_grad_enabled(), torch.is_autocast_enabled())
        if self.states.of(key) is UNKNOWN:
            first = FirstPass(self, arguments, key, plannable, method)
            found = first.run()
            if found is not None:
                return found
            if self.behaviour.looped or first.disturbed:
                return self.loop(arguments, method)
        elif plannable:
            planned = self.planned(arguments, key)
            if planned is not None:
                return planned
        return self._fold_or_loop(arguments, key, method)

    def _fold_or_loop(self, arguments: Arguments, key: Any, method: str) -> list[Any]:
        """Fold; where that fails and the members one by one do not, loop from now on."""
        try:
            with counted_if_it_succeeds():
                return self.fold(arguments, key, method)
        except WritesInput:  # on the way that it takes now
            self.behaviour.writes_arguments = True
            return self._fold_or_loop(arguments, key, method)
        except Disturbed:
            return self.loop(arguments, method)
        except Exception as error:  # the members decide whether it is their own error
            if is_out_of_memory(error) or isinstance(error, NothingDropped | StopRecomputation):
                raise
            why, weights = f"{type(error).__name__}: {error}", isinstance(error, NotFoldable)
        self.unshare_all(weights)  # what they write to is each one's own; it may be the caller's error, and no fold's
        result = self.loop(arguments, method)
        self.give_up(f"the fold failed where they do not: {why}")
        return result

    def evaluate_drawn(self, arguments: Arguments, members: Tensor) -> Any:
        """Run for each sample only its member, ``members`` int64 [B] on the CPU; return what a member returns."""
        refuse_tracers()
        return DrawnCall(self, arguments, members).run()

    def can_plan(self, arguments: Arguments) -> bool:
        """Whether a call may run as a plan."""
        if torch.compiler.is_compiling():
            return False
        if self.cap.asked is not None and self.cap.cuts(self.num_members, arguments.batch_size):
            return self.plans.decline(f"max_fold={self.cap.asked} takes several passes")
        if not arguments.plain():
            return self.plans.decline("an argument is neither an ordinary tensor nor a number, a name or a dtype")
        if self.behaviour.writes_arguments and arguments.share_memory():
            return self.plans.decline("the network writes to its arguments, and they share memory")
        return self.plans.can_plan(arguments.tensors)

    def evaluate_sum(self, arguments: Arguments, weights: list[float]) -> tuple[Tensor, Any] | None:
        """The members' only output, summed with K factors as the last layer computes it, [B, ...], and its structure.

        None where no plan of this call does that: then evaluate, and add.
        """
        refuse_tracers()
        if self.behaviour.looped or reproducible.enabled() or not self.can_plan(arguments):
            return None
        return PlannedCall(self, arguments).run_sum(weights)

    def planned(self, arguments: Arguments, key: Any, expected: list[list[Tensor]] | None = None) -> list[Any] | None:
        """Make the plan of a signature, where the memory holds a recording, and run it.

        Args:
            arguments: of the call.
            key: the signature.
            expected: the members' own outputs; none where the fold was held against them already.
        """
        if not self.cap.holds_recording(key, self.num_members * arguments.batch_size):
            self.plans.decline("the free memory does not hold a recording of it")
            return None
        return PlannedCall(self, arguments).make(expected)
