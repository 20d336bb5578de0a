"""Passes of all members: the network's own code run once, with the member as a hidden dimension."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from fastens.device import capturing
from fastens.engine.arguments import Arguments
from fastens.engine.derivatives import Disturbed, check_gradients
from fastens.engine.entering import call
from fastens.engine.leaves import unwrapped
from fastens.engine.memory_cap import MemoryCap
from fastens.engine.numbers import Numbers
from fastens.engine.objects import unchanged
from fastens.engine.passes import ReadsRows, in_passes
from fastens.engine.rows import RowsOfMembers
from fastens.engine.stacked import StackedMembers
from fastens.fold import functions, handlers, rules  # noqa: F401  (they register themselves)
from fastens.fold.callsite import check_derivatives
from fastens.fold.dispatch import Fold, inside
from fastens.fold.sharing import Sharing, check_sharing
from fastens.fold.stand_ins import traced
from fastens.fold.tensor import Hidden, NotFoldable
from fastens.network.stacking import tensors_of
from fastens.network.state import NetworkState, random_kept, state_kept
from fastens.refusals import insisted

Result = TypeVar("Result")
Outputs = Callable[[Arguments], list[Tensor]]


class FoldedMembers(StackedMembers):
    """Members that one pass evaluates together, or several passes where memory asks for it.

    Args:
        *members: as :class:`StackedMembers` takes them.
        max_fold: the most rows of a pass that the user asked for; none for no bound.
        backend: the code that runs the ops.

    Attributes:
        cap: how many rows a pass may have.
        rows: which arguments carry rows, as members have shown.
        ways: of convolution that the last pass took, by the identity of their kernels.
        slices: functions without a rule that it ran member by member, and how often.
        functions: hand-written ``autograd.Function``s that passes have differentiated.
    """

    def __init__(self, *members: Any, max_fold: int | None, backend: str) -> None:
        super().__init__(*members)
        self.backend = backend
        self.cap = MemoryCap(max_fold)
        self.rows = RowsOfMembers()
        self.ways: dict[int, str] = {}
        self.slices: dict[str, int] = {}
        self.functions: set[type] = set()
        self._held_functions: set[tuple[type, str]] = set()

    def new_pass(
        self,
        hidden: Hidden,
        arguments: Arguments,
        recording: bool = False,
        samples: Tensor | None = None,
        numbers: Numbers | None = None,
    ) -> Fold:
        """Return a pass that has not run.

        ``samples``, int64 [R], are those of its rows where they are a plan's input.
        """
        inputs = () if arguments.owned and not recording else tuple(arguments.tensors)
        return Fold(
            hidden,
            wrapped=self.behaviour.wrapped,
            recording=recording,
            inputs=inputs,
            dropouts=self.kind.dropouts(hidden, arguments, samples),
            numbers=numbers,
            reference=self.backend == "reference",
            network=self.kind.network_of(hidden, self.network),
        )

    def run(
        self,
        fold: Fold,
        arguments: Arguments,
        method: str = "forward",
        rows: bool = False,
        network: nn.Module | None = None,
    ) -> Any:
        """Return what the network's own code, or a member's module, gives in a pass: of wrappers, not stacks."""
        args, kwargs = arguments.bound_rows(fold) if rows else arguments.bound(fold)
        network = network or self.network
        fold.dropouts.runs(network)
        try:
            with inside(fold), insisted():
                output = call(network, method, args, kwargs)
        except Exception as error:
            if type(error).__module__.startswith("torch._dynamo") and not torch.compiler.is_compiling():
                torch._dynamo.reset()  # what it failed to trace, as in torch.cond, it would not try again in members
            raise
        self.functions |= fold.functions
        if torch.is_grad_enabled():
            check_derivatives(pytree.tree_leaves(output))
        if method == "forward" and arguments.batch_size:
            fold.dropouts.check()
        return output

    def call_module(self, module: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a module that is member k returns."""
        return self.kind.call(self, module, k, arguments, method)

    def fold(self, arguments: Arguments, key: Any = None, method: str = "forward") -> list[Any]:
        """Return all members' leaves [K, ...] and their structure.

        Several passes, of some members or rows, if memory asks.
        """
        if torch.compiler.is_compiling() or capturing():
            return in_passes(self, arguments, key, method)
        state = NetworkState(self.network)  # a branch that no call took before may write to it first
        try:
            with self.writes_checked(self.network), unchanged(arguments):
                leaves = in_passes(self, arguments, key, method)
            if shared := state.shared():
                raise NotFoldable(shared)
            if self.functions:
                one_by_one, at_once = (functools.partial(f, method) for f in (self._one_by_one, self._at_once))
                self.hold_functions(arguments, one_by_one, at_once)
        except StopRecomputation:
            raise
        except BaseException:
            self._remembers(state.put_back())  # the members begin where this pass did
            raise
        if self.behaviour.writes_itself and not self.behaviour.looped:
            self._views.forget()  # members by themselves begin with the state that this pass left behind
            self.tensors = list(tensors_of(self.network).values())
        return leaves

    def hold_functions(self, arguments: Arguments, members: Outputs, fold: Outputs, how: str = "") -> None:
        """Hold the gradients of ``autograd.Function``s, where passes of a kind met new ones, against the members'.

        Args:
            arguments: of the call.
            members: the outputs of the members one by one.
            fold: the same of a fold.
            how: the kind of pass.

        Raises:
            NotFoldable: the fold has no such gradients.
            Disturbed: somebody wrote to weights meanwhile, so that nothing is known of them.
        """
        new = {(each, how) for each in self.functions} - self._held_functions
        if not new or traced(*arguments.tensors):
            return
        self._held_functions |= new  # before a fold that comes here again
        weights = self.weights_now()
        try:
            check_gradients(self, arguments, members, fold)
        except NotFoldable as error:
            self._held_functions -= new
            if self.weights_now() != weights:
                raise Disturbed(f"{error}") from error
            names = ", ".join(sorted(each.__name__ for each, _ in new))
            raise NotFoldable(f"autograd.Function ({names}): {error}") from error

    def hold_sharing(self, passes: list[Sharing], arguments: Arguments, method: str = "forward") -> None:
        """Hold what passes wrote to against the first member, which nothing of this call stays behind in.

        Raises:
            NotFoldable: a write reaches what it does not reach in the member, or the other way round.
        """

        def member() -> None:
            view = self.view(0)
            with random_kept(), state_kept(self.network), state_kept(view):
                self.call_module(view, 0, arguments.copied(), method)

        check_sharing(passes, member)

    def _one_by_one(self, method: str, arguments: Arguments) -> list[Tensor]:
        """The members' tensors, one member after the other."""
        outputs = [self.call_module(view, k, arguments, method) for k, view in enumerate(self.views)]
        return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]

    def _at_once(self, method: str, arguments: Arguments) -> list[Tensor]:
        """The same of a fold."""
        leaves = [x for x in self.fold(arguments, (method, "gradients"), method)[:-1] if isinstance(x, Tensor)]
        return [x[k] for k in range(self.num_members) for x in leaves]

    def _remembers(self, changed: set[str]) -> None:
        self.behaviour.writes_itself = self.unshare(changed) or bool(changed) or self.behaviour.writes_itself

    def fold_apart(self, run: Callable[[], Result]) -> Result:
        """Return what passes over some members or rows give.

        What one writes to the network would not be every member's.

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
        """Return the leaves [N, ...] of one pass and their structure.

        With ``part``, raise where Python reads a value.
        """
        fold = self.new_pass(hidden, arguments)
        leaves, spec = pytree.tree_flatten(self.run(fold, arguments, method))
        if part and fold.reads:
            raise ReadsRows(fold.reads)
        self.slices, self.ways = dict(fold.slices), fold.ways
        return [*(unwrapped(x, hidden) for x in leaves), spec]
