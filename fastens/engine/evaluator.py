"""Evaluating all members of one structure: the pass with the member as a hidden dimension, plans, and the loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from fastens import reproducible
from fastens.engine import row_by_row
from fastens.engine.arguments import Arguments
from fastens.engine.calls import PlannedCall, capturing
from fastens.engine.drawn import DrawnCall
from fastens.engine.entering import call
from fastens.engine.first import FirstPass
from fastens.engine.guards import observed
from fastens.engine.leaves import columns_of, unwrapped
from fastens.engine.masked import MaskedMember
from fastens.engine.masks import MaskPass, Masks, NothingDropped
from fastens.engine.memory_cap import MemoryCap, is_out_of_memory
from fastens.engine.numbers import Numbers, SeenNumbers
from fastens.engine.passes import ReadsRows, in_passes
from fastens.engine.planned import Plans
from fastens.engine.rows import RowsOfMembers
from fastens.engine.transformed import in_trace, in_transform
from fastens.fold import handlers, rules  # noqa: F401  (handlers and rules register themselves)
from fastens.fold.around import check_derivatives
from fastens.fold.dispatch import Fold, inside
from fastens.fold.stand_ins import number_of
from fastens.fold.tensor import Hidden, NotFoldable, one_member
from fastens.fold.writes import WritesInput
from fastens.network.folded import build_network, shared_names, skeleton_of
from fastens.network.of_member import called, settle
from fastens.network.originals import Originals
from fastens.network.stacking import tensors_of
from fastens.network.state import NetworkState
from fastens.network.tables import tables_of, unshare
from fastens.network.views import MemberViews, State, standing_alone

Result = TypeVar("Result")


class FoldEngine:
    """K members of one structure.

    Nothing of a call is kept here: what a pass needs travels with it, so that any number of threads may call.

    Args:
        skeleton: one member's structure, parameters and buffers on the meta device.
        stacks: its tensors [K, ...] by name.
        shared: the names of those that are held once.
        num_members: K.
        settings: of the ensemble.
        originals: the members that were handed in, against which the first call is held; none where they are gone.
        masks: of members that are dropout masks on one set of weights.

    Attributes:
        network: the folded network, which owns the stacks.
        engine: ``fold`` or ``loop``.
        masks: of members that are dropout masks on one set of weights; else none.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        stacks: dict[str, Tensor],
        shared: frozenset[str],
        num_members: int,
        settings: dict[str, Any],
        originals: Any = None,
        masks: Masks | None = None,
    ) -> None:
        self.num_members = num_members
        self.masks = masks
        self.cap = MemoryCap(settings["max_fold"])
        self.backend: str = settings["backend"]
        self.network = build_network(skeleton, stacks, shared, num_members)
        self.plans = Plans(self.network, num_members, self.backend)
        self.engine = "loop" if settings["engine"] == "loop" else "fold"
        self.why = "asked for" if settings["engine"] != "auto" else "members agree in everything but their weights"
        self.checked: set[Any] = set()
        self.ways: dict[int, str] = {}  # of convolutions in the last pass
        self.slices: dict[str, int] = {}  # functions without a rule
        self.originals = None if originals is None else Originals(originals, self.network)
        self.one = frozenset() if self.originals is None else self.originals.of_one_object()  # names, in all members
        self.wrapped = masks is not None  # whether common tensors become member-valued in place
        self.copies_inputs = False  # whether the network writes to its arguments
        self.stateful = False  # whether a pass changes the network's own Python state
        self.rows = RowsOfMembers()
        self.fills: set[Any] = set()  # signatures whose caches all members have filled
        self.numbers = SeenNumbers()
        self._views = MemberViews(self.network, num_members, self.plans.guards.barrier)
        self.number = number_of(self)
        self.nested: Any = None
        self.tensors = list(tensors_of(self.network).values())  # what a compiled graph takes, in this order
        if masks is not None:
            masks.bind(self.network)
        if self.engine == "loop":
            self._unshare_all()

    @property
    def skeleton(self) -> nn.Module:
        """One member's structure as it is now, without weights."""
        return skeleton_of(self.network)

    @property
    def shared(self) -> frozenset[str]:
        """Names of the tensors that all members share."""
        return shared_names(self.network)

    def member(self, k: int) -> nn.Module:
        """A module with a copy of member k's weights; one that always applies member k's masks."""
        member = standing_alone(self._views.fresh(k), self.skeleton)
        return member if self.masks is None else MaskedMember(member, self.masks, k)

    def own_states(self) -> tuple[list[State], str]:
        """What the members wrote to themselves, where they are called one by one, and why they are."""
        return (self._views.own_states() if self.engine == "loop" else []), self.why

    def adopt_states(self, states: list[State], why: str) -> None:
        """Go on with what the members of another engine wrote to themselves, one by one."""
        if any(any(state) for state in states):
            self.engine, self.why = "loop", why
            self._unshare_all()
            self._views.adopt(states)

    def refresh(self, state: bool = True) -> None:
        """Forget which signatures were checked, what they need of memory, the plans, and copies of Python state.

        Args:
            state: whether the Python state of members is copied anew as well.
        """
        if state:
            self._views.look()
        for _, _, table in tables_of(self.network):
            table.forget()
        self.tensors = list(tensors_of(self.network).values())
        self.checked.clear()
        self.rows.clear()
        self.fills.clear()
        if self.masks is not None:
            self.masks.bind(self.network)
        self.cap.clear()
        self.plans.clear()
        self.originals = None

    # Members one by one
    @property
    def views(self) -> list[nn.Module]:
        """Every member as a module of its own, whose tensors are parts of the stacks."""
        if self.engine == "loop" and self._views.stale:
            self._unshare_all(weights=False)  # of what was put in
        return self._views.get()

    def attribute(self, name: str) -> Any:
        """An attribute of the network, or the first member's where members write to attributes of their own."""
        own = self._views.attributes
        return own[name] if name in own else getattr(self.network, name)

    def call_member(self, k: int, arguments: Arguments, method: str = "forward", remembers: bool = False) -> Any:
        """What member k returns, by its own Python; it remembers the call where members are known to, or it shall."""
        view, remembers = self.views[k], remembers or self.stateful or self.engine == "loop"
        if remembers:
            self._views.keep()
        output = self.call_module(view, k, arguments, method)
        settle(view, keeps=remembers, copies=self.engine == "loop")
        return output

    def call_module(self, module: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a module that is member k returns."""
        if self.masks is None:
            with called():
                return call(module, method, *arguments.of_member(k))
        hidden, arguments = one_member(self.num_members, k), arguments.copied()
        self.masks.know(module)
        output = self.run(self.new_pass(hidden, arguments), arguments, method, network=module)
        return pytree.tree_map(lambda x: unwrapped(x, hidden)[0], output)

    def loop(self, arguments: Arguments, method: str = "forward", call_member: Any = None) -> list[Any]:
        """Run the members one by one; the leaves of their outputs, lists of K, and the structure last."""
        call_member = call_member or functools.partial(self.call_member, remembers=True)
        outputs = (call_member(k, arguments, method) for k in range(self.num_members))
        return columns_of([pytree.tree_flatten(output) for output in outputs])

    def give_up(self, why: str) -> None:
        """Take the loop from now on, and say why."""
        self.engine, self.why = "loop", why
        self._unshare_all()
        self.plans.clear()
        warnings.warn(f"fastens: members are evaluated one by one, because {why}", stacklevel=6)

    def unshare(self, names: Iterable[str]) -> bool:
        """Give each member its own of these tensors, unless one object is in all; return whether there are."""
        found = unshare(self.network, set(names) - self.one)
        self.tensors = list(tensors_of(self.network).values())
        return found

    def _unshare_all(self, weights: bool = True) -> None:
        """Give each member its own of what its own code may write; masks have one set of weights."""
        some = dict(self.network.named_buffers()) if self.masks is not None or not weights else tensors_of(self.network)
        self.unshare(some)

    # All members at once
    def evaluate(self, arguments: Arguments, training: bool, method: str = "forward") -> list[Any]:
        """Run all members; return the leaves of their outputs, [K, ...] or a list of K, and the structure last.

        Args:
            arguments: of the call.
            training: the mode of the ensemble.
            method: what is called.
        """
        if reproducible.enabled() and not torch.compiler.is_compiling():
            return row_by_row.evaluate(self, arguments, training, method)
        return self.evaluate_at_once(arguments, training, method)

    def evaluate_at_once(self, arguments: Arguments, training: bool, method: str = "forward") -> list[Any]:
        """The same, whatever last bits depend on."""
        if torch.compiler.is_compiling():  # an export, whose tensors are in the tables
            return in_trace(self, arguments, method)
        if self.engine == "loop":
            return self.loop(arguments, method)
        if observed():
            return in_transform(self, lambda call: self.loop(arguments, method, call))
        plannable = method == "forward" and self.can_plan(arguments)
        if plannable:
            planned = PlannedCall(self, arguments).run()
            if planned is not None:
                return planned
        if capturing():
            return self.fold(arguments, None, method)
        self.numbers.note(arguments)
        key = (method, arguments.signature(), training, torch.is_grad_enabled(), torch.is_autocast_enabled())
        if key not in self.checked:
            found = FirstPass(self, arguments, key, plannable, method).run()
            if found is not None:
                return found
            if self.engine == "loop":
                return self.loop(arguments, method)
        elif plannable:
            planned = self.planned(arguments, key)
            if planned is not None:
                return planned
        return self._fold_or_loop(arguments, key, method)

    def _fold_or_loop(self, arguments: Arguments, key: Any, method: str) -> list[Any]:
        try:
            return self.fold(arguments, key, method)
        except WritesInput:  # on the way that it takes now
            self.copies_inputs = True
            return self._fold_or_loop(arguments, key, method)
        except Exception as error:  # the members decide whether it is their own error
            if is_out_of_memory(error) or isinstance(error, NothingDropped | StopRecomputation):
                raise
            why, weights = f"{type(error).__name__}: {error}", isinstance(error, NotFoldable)
        self._unshare_all(weights)  # what they write to is each one's own; it may be the caller's error, and no fold's
        result = self.loop(arguments, method)
        self.give_up(f"the fold failed where they do not: {why}")
        return result

    def evaluate_drawn(self, arguments: Arguments, members: Tensor) -> Any:
        """Run for each sample only its member, ``members`` int64 [B] on the CPU; return what a member returns."""
        return DrawnCall(self, arguments, members).run()

    def can_plan(self, arguments: Arguments) -> bool:
        """Whether a call may run as a plan."""
        if torch.compiler.is_compiling():
            return False
        if self.cap.cuts(self.num_members, arguments.batch_size):
            return self.plans.decline(f"max_fold={self.cap.asked} takes several passes")
        if not arguments.plain():
            return self.plans.decline("an argument is neither an ordinary tensor nor a number, a name or a dtype")
        if self.copies_inputs and arguments.share_memory():
            return self.plans.decline("the network writes to its arguments, and they share memory")
        return self.plans.can_plan(arguments.tensors)

    def mask_pass(self, hidden: Hidden, arguments: Arguments, samples: Tensor | None = None) -> MaskPass | None:
        """The dropout masks of a pass, none where members are no masks."""
        if self.masks is None:
            return None
        members, of_rows = self.masks.layout(hidden, arguments)
        seed, number = arguments.evaluation
        return MaskPass(self.masks, members, of_rows if samples is None else samples, seed, number)

    def evaluate_sum(self, arguments: Arguments, weights: list[float]) -> tuple[Tensor, Any] | None:
        """The members' only output, summed with K factors as the last layer computes it, [B, ...], and its structure.

        None where no plan of this call does that: then evaluate, and add.
        """
        if self.engine == "loop" or reproducible.enabled() or not self.can_plan(arguments):
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
            return None
        return PlannedCall(self, arguments).make(expected)

    def new_pass(
        self,
        hidden: Hidden,
        arguments: Arguments,
        recording: bool = False,
        samples: Tensor | None = None,
        numbers: Numbers | None = None,
    ) -> Fold:
        """A pass over a hidden dimension; fresh masks may have the samples of its rows from a plan's inputs."""
        inputs = () if arguments.owned and not recording else tuple(arguments.tensors)
        return Fold(
            hidden,
            wrapped=self.wrapped,
            recording=recording,
            inputs=inputs,
            masks=self.mask_pass(hidden, arguments, samples),
            numbers=numbers,
            reference=self.backend == "reference",
            network=None if self.masks is not None and hidden.size == 1 else self.network,
        )

    def run(
        self,
        fold: Fold,
        arguments: Arguments,
        method: str = "forward",
        rows: bool = False,
        network: nn.Module | None = None,
    ) -> Any:
        """Run the network's own code, or a member's, in a pass; return what it returns, of wrappers."""
        args, kwargs = arguments.bound_rows(fold) if rows else arguments.bound(fold)
        with inside(fold):
            output = call(network or self.network, method, args, kwargs)
        if torch.is_grad_enabled():
            check_derivatives(pytree.tree_leaves(output))
        if fold.masks is not None and method == "forward" and not fold.masks.applied and arguments.batch_size:
            calls = sum(fold.masks.calls.values())
            raise NothingDropped(f"{calls} dropouts with p = 0" if calls else "no dropout")
        return output

    def fold(self, arguments: Arguments, key: Any = None, method: str = "forward") -> list[Any]:
        """One pass of all members, or several where memory asks for it: of some members each, or of rows of one."""
        if torch.compiler.is_compiling() or capturing():
            return in_passes(self, arguments, key, method)
        state = NetworkState(self.network)  # a branch that no call took before may write to it first
        try:
            leaves = in_passes(self, arguments, key, method)
            if shared := state.shared():
                raise NotFoldable(shared)
        except StopRecomputation:
            raise
        except BaseException:
            self._remembers(state.put_back())  # the members begin where this pass did
            raise
        if self.stateful and self.engine == "fold":
            self._views.forget()  # members by themselves begin with the state that this pass left behind
            self.tensors = list(tensors_of(self.network).values())
        return leaves

    def _remembers(self, changed: set[str]) -> None:
        self.stateful = self.unshare(changed) or bool(changed) or self.stateful

    def fold_apart(self, run: Callable[[], Result]) -> Result:
        """A pass over some members or rows; what it left behind in the network would not be every member's.

        Raises:
            NotFoldable: it left something behind, which is undone.
        """
        if torch.compiler.is_compiling() or capturing():
            return run()
        state, shared = NetworkState(self.network), ""
        try:
            result = run()
            shared = state.shared()
        finally:
            changed = state.put_back()
            self._remembers(changed)
        if shared or changed:
            names = ", ".join(sorted(changed)[:3])
            raise NotFoldable(shared or f"the network writes to itself ({names}), here for some members only")
        return result

    def one_pass(self, arguments: Arguments, hidden: Hidden, method: str = "forward", part: bool = False) -> list[Any]:
        """The leaves of one pass, [N, ...], and their structure last; of a part of the rows, where no value is read."""
        fold = self.new_pass(hidden, arguments)
        leaves, spec = pytree.tree_flatten(self.run(fold, arguments, method))
        if part and fold.reads:
            raise ReadsRows(fold.reads)
        self.slices, self.ways = dict(fold.slices), fold.ways
        return [*(unwrapped(x, hidden) for x in leaves), spec]
