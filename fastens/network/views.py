"""Every member as a module of its own, for the loop: tensors in the stacks, Python state of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.alike import HOOK_TABLES, attributes_apart
from fastens.network.barrier import Barrier, counts, unwatched
from fastens.network.contents import inside
from fastens.network.deep_copies import copied, outliving, undisturbed
from fastens.network.handed_out import HandOuts
from fastens.network.hooks import rebound
from fastens.network.looks import Looks
from fastens.network.made import MadeWhenCalled
from fastens.network.member_tables import (
    MemberTable,
    Reference,
    read_by,
    renew_parts,
    take_parts,
    view_of_member,
)
from fastens.network.own_states import (
    GONE,
    NO_STATE,
    TENSORS,
    State,
    known_places,
    moved,
    own_state,
    pairs_of,
    same_objects,
    write,
)
from fastens.network.reaching_back import reaches_back
from fastens.network.shown import Shown
from fastens.network.snapshots import held_tensors, is_atom
from fastens.network.state import REREAD
from fastens.network.weights import Weights

_WHY = "members wrote to it themselves, each its own:"


class MemberViews:
    """The members of a folded network, made when they are asked for and again when its Python state was written to.

    What a member's own code wrote to itself is kept, unless the network was given another value since.

    Args:
        network: the folded network.
        num_members: K.
        barrier: counts writes to the network's Python state.
    """

    def __init__(self, network: nn.Module, num_members: int, barrier: Barrier) -> None:
        self._network = network
        self._values = Shown(network)
        self._num_members = num_members
        self._barrier = barrier
        self.forget()

    def forget(self) -> None:
        """Drop the members, and what they wrote to themselves."""
        self._values.hide()
        self._views: list[nn.Module] = []
        self._given: list[nn.Module] = []  # the members, as they were before code of their own ran
        self._given_references: list[Reference] = []
        self._modules: list[nn.Module] = []  # of the network, when they were made
        self._references: list[Reference] = []  # of their attributes, to parts of the stacks
        self._hooks_seen = -1
        self._hooked: list[nn.Module] = []  # the members that have the network's hooks
        self._hooks_given: list[tuple[dict[int, Any], set[int]]] = []  # tables of theirs, with what these were given
        self._hooks_of: list[tuple[dict[int, Any], set[int]]] = []  # of the network, but for empty ones that tell
        self._handed_out = HandOuts(_WHY)
        self.look()

    def look(self) -> None:
        """Make the members anew when they are asked for next: what they were given may have changed inside."""
        self._writes: Any = None
        self._held, self._inside = Weights([]), Looks([])

    @property
    def stale(self) -> bool:
        """Whether the network, or what it holds, was written to, or weights moved that attributes hold."""
        return self._written or self._writes[1] != self._held.state()

    @property
    def _written(self) -> bool:
        """The same but for values of tensors that it holds, which may be the first member's own."""
        written = not self._views or self._writes is None or self._writes[0] != self._barrier.written
        return written or not self._inside.same() or any(reference.stale for reference in self._references)

    def get(self) -> list[nn.Module]:
        """The members, in the modes of the network's modules."""
        views = self._current()
        for view in views:
            self._set_modes(view)
        return views

    def member(self, k: int) -> nn.Module:
        """One of them."""
        view = self._current()[k]
        self._set_modes(view)
        return view

    def _set_modes(self, view: nn.Module) -> None:
        for module, original in self._pairs(view):
            if module is not None and module.training is not original.training:
                module.training = original.training
                _set_mode([x for n, x in module._modules.items() if n not in original._modules], original.training)

    def _pairs(self, view: nn.Module) -> list[tuple[nn.Module | None, nn.Module]]:
        """Each module of the network with the member's; see :func:`pairs_of`."""
        try:
            return pairs_of(view, self._network)
        except MadeWhenCalled:
            self.forget()
            raise

    @contextmanager
    def running(self, k: int | None = None) -> Iterator[None]:
        """Scope of code of member k, or of all of them, which may change what was handed out of theirs."""
        with self._handed_out.running(range(self._num_members) if k is None else (k,)):
            shows = not k and not self.stale  # else others wrote to it before
            try:
                yield
            finally:
                if shows and self._given and not self._written:
                    self._show()

    def _show(self) -> None:
        """Let the network show what the first member wrote to itself, which is no write of others."""
        if self._values.show(self._views[0], self._given[0]):
            self._see()

    def _see(self) -> None:
        """Take the network as it is for what members were given."""
        self._held, self._inside = Weights(held_tensors(self._network)), inside(self._network)
        self._writes = self._barrier.written, self._held.state()

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """Scope in which the network is as members were given it, without what the first of them wrote."""
        if self._given:
            self._current()
        self._values.hide()
        try:
            yield
        finally:
            if self._given:
                self._show()

    def _current(self) -> list[nn.Module]:
        if self._handed_out:
            names, network = self._barrier.names, id(self._network)
            self._handed_out.follow(self._views, lambda name: (network, name) in names)
        views = self._views  # as they are here: another thread may forget them meanwhile
        if self.stale:
            views = self._make()
        if self._hooks_seen != self._barrier.hooks or any(hooks.keys() != seen for hooks, seen in self._hooks_of):
            self._hook(views)
        return views

    def _hook(self, views: list[nn.Module]) -> None:
        """Give members the hooks that the network got since, which run in fold and loop alike, and take those it lost.

        The tables are each member's own: a hook may take itself away by a handle that the member has.
        """
        known = {id(own): given for own, given in self._hooks_given}
        known_members, before = set(map(id, self._hooked)), (self._hooked, self._hooks_given)
        self._hooks_seen, self._hooked, self._hooks_given = self._barrier.hooks, views, []
        tables = [vars(module)[name] for _, module in modules_of(self._network) for name in HOOK_TABLES]
        self._hooks_of = [(hooks, set(hooks)) for hooks in tables if hooks or not counts(hooks)]
        for view in views:
            pairs = self._pairs(view)
            modules = {id(theirs): mine for mine, theirs in pairs if mine is not None}
            for name in HOOK_TABLES:
                for module, original in pairs:
                    if module is None:
                        continue
                    own, hooks = vars(module)[name], vars(original)[name]
                    given = known.get(id(own), set[int]()) if id(view) in known_members else None
                    kept = own if given is not None else {}  # of a member that is new, the tables are copies
                    now = {
                        key: kept[key] if given and key in given else rebound(hook, modules)
                        for key, hook in hooks.items()
                        if not given or key not in given or key in kept
                    }
                    now |= {key: hook for key, hook in kept.items() if key not in hooks and key not in (given or ())}
                    if now or own:
                        own.clear()
                        own.update(now)
                    if hooks:
                        self._hooks_given.append((own, set(hooks)))
        del before  # whose identities stand for them until here

    def keep(self) -> None:
        """Keep what members write to themselves from now on."""
        if not self._given:
            self._given, self._given_references = self._anew()
            self._values = Shown(self._network)
            if self._views:
                self._values.begin(self._views[0])

    def check_kept(self, view: nn.Module) -> None:
        """Raise where a member keeps a weight, which a call of it read, in an attribute.

        It would miss the gradients of other calls, and what takes the place of the weight's memory.
        """
        read = read_by(view)
        known = {id(reference.part) for reference in self._references}
        if read.keys() <= known:
            return
        for each in held_tensors(view, REREAD):
            if id(each) in read and id(each) not in known:
                names = {id(stack): name for name, stack in tensors_of(self._network).items()}
                raise ValueError(
                    f"a member keeps {names.get(read[id(each)], 'a weight')} in an attribute when it is called, which "
                    "the loop over stacks cannot follow: read it where it is used, or keep it when the member is made"
                )

    def attribute(self, name: str) -> Any:
        """An attribute of the network, or the first member's where it wrote to that itself."""
        if self._given:
            view, given = self.get()[0], self._given[0]
            if name in self._values:
                self._values.look()
                self._show()  # a checkpoint may have run its code again in a backward pass
                return getattr(self._network, name)
            own = vars(view).get(name, GONE) if name not in TENSORS else GONE
            wrote = is_atom(own) or name in self._handed_out  # of which what it holds may be as it was
            if own is not GONE and (wrote or name in attributes_apart(view, given, NO_STATE)(view, given)):
                self._handed_out.add(name, self._views)
                return own
        return getattr(self._network, name)

    @property
    def remember(self) -> bool:
        """Whether a member wrote to itself."""
        if self._given:
            self._current()
        return any(any(own_state(view, given)) for view, given in zip(self._views, self._given, strict=False))

    def own_states(self, skeleton: nn.Module) -> list[State]:
        """What each member wrote to itself; where that refers to the member, it refers to a skeleton instead."""
        pairs = zip(self._current() if self._given else [], self._given, strict=True)
        return [moved(own_state(view, given), view, skeleton) for view, given in pairs]

    def adopt(self, states: list[State], skeleton: nn.Module) -> None:
        """Give members what the members of another engine had written to themselves, see :meth:`own_states`."""
        if states:
            self.get()
            self.keep()
            for view, state in zip(self._views, states, strict=True):
                write(view, moved(state, skeleton, view))
            self._show()

    def fresh(self, k: int) -> nn.Module:
        """Member k with the state that the network has now, noticed or not, and with what it wrote to itself."""
        if not self._given:
            return undisturbed(lambda: unwatched(view_of_member(self._network, k)[0]))
        self.look()
        return self.get()[k]

    def _anew(self) -> tuple[list[nn.Module], list[Reference]]:
        made = undisturbed(lambda: [view_of_member(self._network, k) for k in range(self._num_members)])
        return [unwatched(view) for view, _ in made], [each for _, references in made for each in references]

    def _make(self) -> list[nn.Module]:
        if self._views and self._given:
            self._values.follow(self._barrier.names, self._views, self._given, _WHY)
        own = [self._values.own(view) for view in self._views]  # as `ens.b = ens.a` gives each member its own
        self._values.hide(self._barrier.names)
        self._held, self._inside = Weights(held_tensors(self._network)), inside(self._network)
        writes, written = (self._barrier.written, self._held.state()), self._barrier.names
        self._barrier.names = set()
        back = reaches_back(self._network, HOOK_TABLES)
        if back is not None:
            raise ValueError(
                f"{back.name} reaches a part of the ensemble's network {back.how}, which members one by one would "
                "share: call every member once, and make the ensemble of them then"
            )
        modules, (made, references) = list(self._network.modules()), self._anew()
        views = self._views
        if views and self._given:
            given, given_references = self._anew()
            with outliving():
                references = self._update(made, references, given, written, own)
            made, self._given, self._given_references = views, given, given_references
            self._values = Shown(self._network, self._values)
        self._hook(made)
        self._modules, self._views, self._writes, self._references = modules, made, writes, references
        if self._given and not self.stale:
            self._show()
        return made

    def _update(
        self,
        made: list[nn.Module],
        references: list[Reference],
        given: list[nn.Module],
        written: Any,
        shown: list[dict[int, Any]],
    ) -> list[Reference]:
        """Give members what the network was given since; what they keep of themselves refers to them as before.

        Returns the references of these members.

        Args:
            made: new members, whose code did not run.
            references: of these.
            given: the same once more, to compare others with.
            written: identities of the network's modules, and names of their attributes, that were written to.
            shown: of each member, its own in the place of what the network showed.
        """
        network, renewed = self._network.modules, list[Reference]()
        tensors = {id(x): x for x in tensors_of(self._network).values()}  # those of all members stay
        for view, new, before, now, own_of in zip(self._views, made, self._given, given, shown, strict=True):
            renew_parts(before, self._given_references)
            apart, own = attributes_apart(before, now, NO_STATE), dict(modules_of(view))
            known = {id(x): (own.get(path), b) for x, (path, b) in zip(self._modules, modules_of(before), strict=True)}
            mine = {id(x): known.get(id(x), (fresh,))[0] for x, fresh in zip(network(), new.modules(), strict=True)}
            memo = tensors | {id(fresh): mine[id(x)] for x, fresh in zip(network(), new.modules(), strict=True)}
            found = renew_parts(view, self._references)
            taken = take_parts(view, new)
            found += [dataclasses.replace(r, part=taken[id(r.part)]) for r in references if id(r.part) in taken]
            memo |= {id(x): x for x in held_tensors(new) if not x.is_leaf} | taken  # parts, which Python cannot copy
            values: dict[tuple[int, str], Any] = {}  # to set: at once, so that one object stays one
            for original, fresh, other in zip(network(), new.modules(), now.modules(), strict=True):
                module, was = known.get(id(original), (fresh, other))
                if module is None:
                    continue
                names = {*apart(was, other), *(name for m, name in written if m == id(original))}
                names = {*(vars(fresh) if module is fresh else names)} - {*TABLES, *HOOK_TABLES, *NO_STATE}
                values |= {(id(original), name): vars(fresh)[name] for name in names if name in vars(fresh)}
                for name in names & vars(fresh).keys() & vars(original).keys():
                    known_places(vars(original)[name], vars(fresh)[name], own_of, memo)
                for name in names - vars(fresh).keys():
                    vars(module).pop(name, None)
                for name in vars(fresh).keys() & vars(module).keys() - names - {*TABLES, *HOOK_TABLES}:
                    same_objects(vars(fresh)[name], vars(module)[name], memo)
                if (id(original), "training") in written:
                    _set_mode([x for n, x in module._modules.items() if n not in was._modules], original.training)
                for table in TENSORS:
                    _drop(vars(module)[table], [name for m, name in written if m == id(original)])
                    _move_table(module, fresh, table)
                for name in was._modules.keys() - original._modules.keys():
                    module._modules.pop(name, None)
                children = {name: (x, None if x is None else mine[id(x)]) for name, x in original._modules.items()}
                module._modules.update(
                    {name: own for name, (x, own) in children.items() if (own is None) is (x is None)}
                )
            for (original, name), value in copied(values, memo).items():
                vars(mine[original])[name] = value
            held = {id(x) for x in held_tensors(view)}
            renewed += {id(r.part): r for r in found if id(r.part) in held}.values()
        return renewed


def _set_mode(made: list[nn.Module | None], mode: bool) -> None:
    """Give modules that a member made a mode."""
    for each in [x for child in made if child is not None for _, x in modules_of(child)]:
        each.training = mode


def _drop(table: Any, names: Iterable[str]) -> None:
    """Let a member have what the network was given, in the place of tensors of its own by these names."""
    if isinstance(table, MemberTable):
        for name in table.own.intersection(names, table.source):
            table.own.discard(name)


def _move_table(module: nn.Module, fresh: nn.Module, name: str) -> None:
    """Let a member read a module's tensors from the stacks that there are now; what it has of its own stays."""
    table, other = vars(module)[name], vars(fresh)[name]
    if not isinstance(table, MemberTable) or not isinstance(other, MemberTable) or table.source is other.source:
        return
    for each in table.own:
        other.keep(each, table[each])
    vars(module)[name] = other
