"""Members of one structure as stacks of their tensors: what they share, and each of them called by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fastens.engine.arguments import Arguments
from fastens.engine.guards import Guards
from fastens.engine.kinds import MemberKind
from fastens.engine.leaves import columns_of
from fastens.engine.states import Behaviour
from fastens.engine.turns import Turns
from fastens.fold.tensor import modules_of, tensors_of
from fastens.network.asked import Questions, one_by_one
from fastens.network.folded import build_network, shared_names, skeleton_of
from fastens.network.hooks import hooks_for_all
from fastens.network.member_tables import settle
from fastens.network.originals import Originals
from fastens.network.overlaps import check_unwritten, overlapping, trained_together, values_of, written
from fastens.network.own_states import State, standing_alone
from fastens.network.snapshots import thread_locals
from fastens.network.stacking import Stacked
from fastens.network.tables import tables_of, unshare
from fastens.network.views import MemberViews
from fastens.network.weights import as_it_is


class StackedMembers:
    """K members of one structure, whose tensors are stacks [K, ...].

    Args:
        stacked: their structure and stacks.
        num_members: K.
        kind: what members have for themselves.
        behaviour: what is known of the network as a whole.
        originals: the members that were handed in, against which the first call is held; none where they are gone.

    Attributes:
        network: the folded network, which owns the stacks.
        guards: the state of the network, and what counts writes to it.
        questions: what members' own code asks of their weights.
        tensors: the stacks, in the order in which a compiled graph takes them.
    """

    def __init__(
        self,
        stacked: Stacked,
        num_members: int,
        kind: MemberKind,
        behaviour: Behaviour,
        originals: Any = None,
    ) -> None:
        self.num_members, self.kind, self.behaviour = num_members, kind, behaviour
        self._turns = Turns()
        self.network = build_network(*stacked[:3], num_members)
        self.guards = Guards(self.network)
        self.questions = Questions(self.guards.names)
        self.originals = None if originals is None else Originals(originals, self.network)
        self._one_object = frozenset() if self.originals is None else self.originals.of_one_object()
        self._overlapping = stacked.overlapping
        held_once = stacked.shared - self._one_object if kind.own_weights else ()
        self._frozen = [(n, t) for n, t in tensors_of(self.network).items() if n in held_once and not t.requires_grad]
        self._views = MemberViews(self.network, num_members, self.guards.barrier)
        self.look()
        if behaviour.looped:
            self.unshare_all()

    def turn(self) -> AbstractContextManager[None]:
        """Scope of this thread's turn to run code of the network or of members; in a trace, of nothing."""
        if torch.compiler.is_compiling():
            return nullcontext()
        return self._turns.taken(self.tensors[0].device.type if self.tensors else "cpu")

    def look(self) -> None:
        """Look at the stacks anew, which may have been moved, converted or replaced."""
        for _, _, table in tables_of(self.network):
            table.forget()
        self.tensors = list(tensors_of(self.network).values())
        self.kind.bind(self.network)

    def weights_now(self, k: int | None = None) -> list[Any]:
        """What changes where somebody writes to parameters: to the stacks, or to the members that were handed in.

        Args:
            k: the only one of these members that is looked at.
        """
        given = [] if self.originals is None else self.originals.modules()
        given = given if k is None else given[k : k + 1]
        stacks = [
            x for _, module, table in tables_of(self.network) if table is module._parameters for x in table.stacks()
        ]
        own = [[p for _, m in modules_of(each) for p in m._parameters.values() if p is not None] for each in given]
        return [[as_it_is(p) for p in each] for each in (stacks, *own)]

    @property
    def state_of_python(self) -> tuple[str, int]:
        """What changes with what code reads of modules and of what is outside of them, but with no weights."""
        return self.guards.barrier.state, self.guards.read

    @property
    def skeleton(self) -> nn.Module:
        """One member's structure as it is now, without weights."""
        with self._views.as_given():
            return skeleton_of(self.network)

    @property
    def shared(self) -> frozenset[str]:
        """Names of the tensors that all members share."""
        return shared_names(self.network)

    def member(self, k: int) -> nn.Module:
        """A module that is member k, with copies of its tensors."""
        with self.turn():
            return self.kind.handed_out(standing_alone(self._members.fresh(k), self.skeleton), k)

    @property
    def remember(self) -> bool:
        """Whether members are called one by one, and wrote to themselves."""
        with self.turn():
            return self.behaviour.looped and self._members.remember

    def own_states(self, skeleton: nn.Module) -> tuple[list[State], str]:
        """What the members wrote to themselves, where they are called one by one, and why they are.

        Args:
            skeleton: what that refers to in the place of a member.
        """
        with self.turn():
            return (self._members.own_states(skeleton) if self.behaviour.looped else []), self.behaviour.why

    def states_of_copy(self, skeleton: nn.Module) -> tuple[list[State], str]:
        """The same for a copy, without what members keep for each thread: a copy makes that as its class says."""
        states, why = self.own_states(skeleton)
        states = [[{n: x for n, x in own.items() if not thread_locals(x)} for own in state] for state in states]
        return states, why

    def adopt_states(self, skeleton: nn.Module, states: list[State], why: str) -> None:
        """Go on with what the members of another engine wrote to themselves, one by one; see :meth:`states_of_copy`."""
        if any(any(state) for state in states):
            self.behaviour.looped, self.behaviour.why = True, why
            self.unshare_all()
            self._views.adopt(states, skeleton)

    def take_state(self, skeleton: nn.Module, k: int, state: State) -> None:
        """Let member k have written this to itself, where members are called one by one; see :meth:`own_states`."""
        if self.behaviour.looped:
            none: State = [{} for _ in skeleton.modules()]
            states = self._members.own_states(skeleton) or [none] * self.num_members
            self._views.forget()
            self._views.adopt([*states[:k], state, *states[k + 1 :]], skeleton)

    @property
    def views(self) -> list[nn.Module]:
        """Every member as a module of its own, whose tensors are parts of the stacks."""
        with self.turn():
            return self._members.get()

    def view(self, k: int) -> nn.Module:
        """One of them."""
        with self.turn():
            return self._members.member(k)

    @property
    def _members(self) -> MemberViews:
        """The members as they are to be made: where they are looped, each has its own of a buffer that was put in."""
        if self.behaviour.looped and self._views.stale:
            self.unshare_all(weights=False)
        return self._views

    def attribute(self, name: str) -> Any:
        """An attribute of the network, or the first member's where members write to attributes of their own."""
        with self.turn():
            return self._members.attribute(name)

    def call_member(self, k: int, arguments: Arguments, method: str = "forward", remembers: bool = False) -> Any:
        """What member k returns, by its own Python; it remembers the call where members are known to, or it shall."""
        with self.turn():
            view, remembers = self.view(k), remembers or self.behaviour.writes_itself or self.behaviour.looped
            if remembers:
                self._views.keep()
            with self._views.running(k), self.writes_checked(view):
                try:
                    output = self.call_module(view, k, arguments, method)
                finally:  # what a member did before its error it has done
                    settle(view, keeps=remembers, copies=self.behaviour.looped)
            if remembers:
                self._views.check_kept(view)
            return output

    @property
    def overlapping(self) -> frozenset[str]:
        """Names of tensors that shared memory in the members that were handed in; see :class:`Stacked`."""
        return self._overlapping

    def check_overlaps(self, member: nn.Module) -> None:
        """Take note of what shares memory in a member that takes the place of another.

        Raises:
            ValueError: some of it is trained.
        """
        if (pair := trained_together(member)) is not None:
            raise ValueError(f"{' and '.join(pair)} share memory in it and are trained, which stacks hold apart")
        self._overlapping |= overlapping([member])

    def check_written(self, names: Iterable[str]) -> None:
        """Raise where code writes to one of several tensors that shared memory in the members that were handed in.

        Raises:
            ValueError: it does.
        """
        check_unwritten(self._overlapping.intersection(names))

    @contextmanager
    def writes_checked(self, network: nn.Module) -> Iterator[None]:
        """Scope of code of the network, or of a member, whose writes are checked likewise."""
        wanted = self._overlapping and not torch.compiler.is_compiling()
        before = values_of(network, self._overlapping) if wanted else {}
        yield
        check_unwritten(written(network, before))

    def running(self) -> AbstractContextManager[None]:
        """Scope of code of the members beside their calls."""
        return self._views.running()

    def call_module(self, module: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a module that is member k returns."""
        raise NotImplementedError

    def loop(self, arguments: Arguments, method: str = "forward", call_member: Any = None) -> list[Any]:
        """Run the members one by one; the leaves of their outputs, lists of K, and the structure last."""
        call_member = call_member or functools.partial(self.call_member, remembers=True)
        with hooks_for_all(self.network) as for_next, one_by_one():
            outputs = (call_member(k, arguments, method) for k in range(self.num_members) if for_next())
            return columns_of([pytree.tree_flatten(output) for output in outputs])

    def unshare(self, names: Iterable[str]) -> bool:
        """Give each member its own of these tensors, unless one object is in all; return whether there are."""
        found = unshare(self.network, set(names) - self._one_object)
        self.tensors = list(tensors_of(self.network).values())
        return found

    def unshare_all(self, weights: bool = True) -> None:
        """Give each member its own of what its own code may write."""
        every = weights and self.kind.own_weights
        self.unshare(tensors_of(self.network) if every else dict(self.network.named_buffers()))

    def unshare_parameters(self) -> None:
        """Give each member its own of every parameter, where members have their own: they are to be trained apart."""
        if self.kind.own_weights:
            self.unshare(dict(self.network.named_parameters()))

    def check_frozen(self) -> None:
        """Raise where a parameter is to be trained that all members had frozen, and that is held once or apart."""
        for name, tensor in self._frozen:
            if tensor.requires_grad and name in self.shared:
                raise ValueError(
                    f"{name} is held once, being equal and frozen in all members, and would be trained on the sum of "
                    "their gradients: unfreeze by ens.requires_grad_(), after which each member has its own, and "
                    "freeze again what stays as it is; or make the ensemble of members in which it is not frozen"
                )

        for name, tensor in tensors_of(self.network).items() if self._overlapping else ():
            if tensor.requires_grad and name in self._overlapping:
                raise ValueError(
                    f"{name} shared memory with another tensor in the members, which were frozen; in the stacks it has "
                    "its own and would be trained apart: make the ensemble of members in which it is not frozen"
                )

    def all_one_object(self, names: Iterable[str]) -> bool:
        """Whether one of these tensors was one object in all members that were handed in: none has its own of it."""
        return not self._one_object.isdisjoint(names)
