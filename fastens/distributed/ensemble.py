"""An ensemble over a mesh: members over one dimension, the rows of a batch over the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import reproducible, rules
from fastens.aggregation import elements_apart
from fastens.distributed import states
from fastens.distributed.exchange import RankLost, split
from fastens.distributed.gradients import dealt, gathered, own_values, replicated
from fastens.distributed.one_process import OfOneProcess
from fastens.distributed.place import Place
from fastens.distributed.shares import Share, check_call
from fastens.distributed.slices import Slices, bits_matter, of_elements, of_rows, weights_of
from fastens.engine.answers import answers_seen
from fastens.engine.arguments import Arguments
from fastens.engine.eager import replicated_by
from fastens.engine.engine import Engine
from fastens.engine.row_by_row import each_member, through_members
from fastens.internal import begin
from fastens.methods import call_method
from fastens.network.stacking import Stacked, tensors_of
from fastens.ops._scores import seed_from
from fastens.ops.aggregate import aggregate
from fastens.ops.member_variance import member_variance
from fastens.outputs import agreed, columns, combined, enters, is_scores, plain
from fastens.through_forward import ReadsParts, through_forward


def over(kind: type, num_members: int, rule: Any, settings: dict[str, Any], place: Place, share: Share) -> Any:
    """An ensemble over a mesh that has no members yet.

    Args:
        kind: of the ensemble in one process.
        num_members: K, of all ranks together.
        rule: of the ensemble.
        settings: as :func:`fastens.settings.check_settings` gives them.
        place: of this process.
        share: of its members.
    """
    made = object.__new__(_with(kind))
    nn.Module.__init__(made)
    made.__dict__.update(_place=place, _share=share, _calls=0, _apart={})
    begin(made, num_members, rule, settings)
    return made


@functools.cache
def _with(base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (Distributed, base), names)


def _apart(engine: Engine, *calls: Arguments) -> bool:
    """Whether each call evaluates its rows independently: a network may ask how many rows there are."""
    return all(engine.rows.independent(engine, each) for each in calls)


class Distributed(OfOneProcess):
    """An ensemble over a mesh: the engine holds this rank's members, every result is that of all members.

    It stands before the class of the ensemble, which ``super()`` is: any of them.
    """

    # Construction

    def _adopt(self: Any, stacked: Stacked, originals: Any = None) -> None:
        if "masks" in self._settings:
            cast(Any, super())._adopt(stacked)
            return
        engine = Engine(stacked, self._share.held, self._settings)
        engine.cap.of_all = self.num_members
        self.__dict__["_engine"] = engine
        self.network = engine.network
        self._become_member_like(stacked.skeleton)

    def _become_member_like(self: Any, member: nn.Module) -> None:
        cast(Any, super())._become_member_like(member)
        self.__class__ = _with(type(self))  # of the class that the members have just given it

    def __getattr__(self: Any, name: str) -> Any:
        """What members have; a method of theirs that would combine what only this rank's compute is refused."""
        found = cast(Any, super()).__getattr__(name)
        if not (isinstance(found, functools.partial) and found.func is call_method):
            return found

        @functools.wraps(call_method)
        def called(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
                with suppress(ReadsParts):
                    return through_forward(self, name, args, kwargs, call_method)
                raise ValueError(f"{name}: over a mesh members are evaluated by forward alone; call it in one process")
            return found(*args, **kwargs)

        return called

    # Calls

    def _evaluated(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule, assigned = self.rule, self._draws.assignment()
        if assigned is not None:
            return assigned.evaluate(self, args, kwargs)
        if rule.random:
            return self._drawn(args, kwargs)
        return self._reduced(args, kwargs, variance=False)[0]

    def forward_with_variance(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Evaluate all members once and return their aggregate and their variance; see the ensemble's."""
        if self.rule.random or self._draws.assignment() is not None:
            return cast(Any, super()).forward_with_variance(*args, **kwargs)
        return self._reduced(args, kwargs, variance=True)

    def _reduced(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any], variance: bool) -> tuple[Any, Any]:
        """The aggregate, and the variance where it is asked for: of slices, or where gradients or rules want all."""
        if torch.is_grad_enabled() or not of_rows(self.rule):
            outputs = self._evaluate(args, kwargs)
            whole = self._combine(outputs, self._aggregation(args, kwargs))
            return whole, plain(self._combine(outputs, member_variance)) if variance else None
        whole = self._arguments(args, kwargs)
        arguments, rows = self._rows_here(whole)
        *leaves, spec = self._local(arguments, whole)
        found = [self._sliced(x, rows, arguments, variance) if is_scores(x) else None for x in leaves]
        parts = [
            pytree.tree_unflatten(
                [self._alike(x) if pair is None else pair[i] for pair, x in zip(found, leaves, strict=True)], spec
            )
            for i in range(1 + variance)
        ]
        return parts[0], plain(parts[1]) if variance else None

    def _sliced(self: Any, scores: Any, rows: list[int], arguments: Arguments, variance: bool) -> tuple[Tensor, ...]:
        """A leaf [k, B, ...] of this rank's members as the aggregate [B, ...] of all, and their variance."""
        place, share = self._place, self._share
        if not scores[0].ndim:  # a number, as of one sample
            whole = self._members_of(scores)
            made = [combined(self._aggregation(*arguments.call), whole)]
            return (*made, combined(member_variance, whole)) if variance else tuple(made)
        own, shape = scores[: share.count], scores[0].shape
        simple = self.rule.linear and not self.rule.needs_noise_level
        few = shape[0] < place.members.size and len(shape) > 1
        forward = functools.partial(type(self).forward, self)
        apart = functools.partial(elements_apart, self.rule, self._settings, self._prediction, forward)
        slices = Slices(
            place.members, share.counts, shape, few and of_elements(self.rule) and apart(arguments.call, shape)
        )
        weights = weights_of(self.rule, self.num_members)
        most = max(share.counts) * scores[0].element_size()
        if simple and weights and not variance and most > 4 and not bits_matter():
            total = slices.total(scores, [*weights[share.first : share.first + share.count], *[0.0] * share.held])
            reduced = [total.to(scores[0].dtype)]
        else:
            stack = slices.members(own if isinstance(own, Tensor) else own or scores[0].new_empty((0, *shape)))
            reduced = [self._of_slice(slices, stack, arguments)]
            reduced += [member_variance(stack) if stack.numel() else stack.sum(0)] if variance else []
        wholes = (slices.whole(each) for each in reduced)
        return tuple(self._all_rows(each, rows) for each in wholes)

    def _of_slice(self: Any, slices: Slices, stack: Tensor, arguments: Arguments) -> Tensor:
        """The aggregate of this rank's slice [K, ...] of all members."""
        if slices.by_elements:
            combine = functools.partial(aggregate, rule=self.rule, backend=self._settings["backend"])
            if type(self.rule) is rules.Geometric:
                return combine(slices.beside_smallest(stack))[:, :-1]
        else:
            at = torch.arange(slices.start, slices.start + slices.size)
            combine = self._aggregation(*arguments.selected(at).call)
        return combine(stack) if stack.numel() else stack.sum(0)

    def _all_rows(self: Any, own: Tensor, rows: list[int], dim: int = 0) -> Tensor:
        """The rows of all, where each rank of "data" has some."""
        if len(rows) == 1 or self._place.data is None:
            return own
        shapes = [(*own.shape[:dim], count, *own.shape[dim + 1 :]) for count in rows]
        return torch.cat(self._place.data.gather(own, shapes), dim)

    def _rows_here(self: Any, arguments: Arguments) -> tuple[Arguments, list[int]]:
        """The arguments of this rank's rows, and how many each rank of "data" has; all where rows are mixed."""
        place, engine, size = self._place, self._engine, arguments.batch_size
        parts = place.num_data
        if parts == 1 or size < parts or engine is None:
            return arguments, [size]
        rows = split(size, parts)
        start = sum(rows[: place.data.rank])
        if not self._rows_apart(arguments, rows):
            return arguments, [size]
        return engine.rows.part(engine, arguments, start, start + rows[place.data.rank]), rows

    def _rows_apart(self: Any, arguments: Arguments, rows: list[int]) -> bool:
        """Whether every row is evaluated by itself, in the call and in the parts of it, as all ranks agree."""
        key = arguments.signature()
        if key not in self._apart:
            engine = self._engine
            try:
                own = _apart(engine, arguments, *(engine.rows.part(engine, arguments, 0, count) for count in {*rows}))
            except Exception:  # it is raised where the call is made, and told
                own = False
            if len(self._apart) > 256:
                self._apart.clear()
            self._apart[key] = bool(self._place.control.agree([int(own)]).all())
        return self._apart[key]

    def _evaluate(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Leaves of this rank's members' outputs, for the whole batch."""
        members, share = self._place.members, self._share
        arguments = self._arguments(args, kwargs)
        if reproducible.enabled():
            with replicated_by(functools.partial(dealt, counts=share.counts, exchange=members)):
                return self._local(self._replicated(arguments, common=False))
        return self._local(self._replicated(arguments))

    def _replicated(self: Any, arguments: Arguments, common: bool = True) -> Arguments:
        """Return the arguments such that their gradients are sums over the members of all ranks."""
        if not torch.is_grad_enabled():
            return arguments
        own, members = "masks" in self._settings, self._place.members
        leaves = [(x, own if i in arguments.own else common) for i, x in enumerate(arguments.leaves)]
        return arguments.with_tensors(
            [replicated(x, members) if sums else x for x, sums in leaves if isinstance(x, Tensor)]
        )

    def _local(self: Any, arguments: Arguments, called: Arguments | None = None) -> list[Any]:
        """Return the leaves of the local members' outputs, and their structure; if one rank fails, all raise.

        Args:
            arguments: of this rank's rows.
            called: of all of them, where they are others.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("an ensemble over a mesh is not trained; train members apart, or call .eval()")
        return self._together(called or arguments, ("all", repr(self.rule)), lambda: self._held(arguments))

    def _held(self: Any, arguments: Arguments) -> list[Any]:
        engine, share = self._engine, self._share
        if engine is None:
            return each_member(self.network, arguments, self._call_module)
        if engine.kind.own_weights:
            return engine.evaluate(arguments, self.training)
        ks = range(share.first, share.first + share.held)
        if reproducible.enabled() and any(x.requires_grad for x in arguments.tensors) and torch.is_grad_enabled():
            return through_members(engine, arguments, ks)
        if reproducible.enabled():  # a plan of some has not the bits of a plan of all, or is none
            *leaves, spec = engine.evaluate(arguments, self.training)
            return [*(x[share.slice] for x in leaves), spec]
        size = arguments.batch_size
        members = torch.arange(share.first, share.first + share.held).repeat_interleave(size)
        repeated = arguments.selected(torch.arange(size).repeat(share.held))
        if not _apart(engine, arguments, repeated):
            return columns([engine.call_member(k, arguments) for k in ks])
        leaves, spec = pytree.tree_flatten(engine.evaluate_drawn(repeated, members))
        return [
            *(x.unflatten(0, (share.held, size)) if isinstance(x, Tensor) else [x] * share.held for x in leaves),
            spec,
        ]

    def _arguments(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call, with the values of a :class:`fastens.PerMember` for this rank's members alone."""
        arguments = cast(Any, super())._arguments(args, kwargs)
        if arguments.own and "masks" not in self._settings:
            arguments.leaves = list(arguments.leaves)
            for i in arguments.own:
                share, given = self._share, arguments.leaves[i]
                arguments.leaves[i] = own_values(given, share.slice, share.counts, self._place.members)
        return arguments

    def _together(self: Any, arguments: Arguments, what: Any, run: Callable[[], Any]) -> Any:
        """Run, and let all ranks know of each other's failure, and that they are called with the same.

        In deterministic mode a plan and torch give a row other bits: where a rank has no plan, the others take none.
        """
        while True:
            with answers_seen() as answers:
                try:
                    found = run()
                except RankLost:
                    raise
                except Exception as error:
                    self._compare(arguments, what, error, False)
                    raise
            if self._compare(arguments, what, None, answers.planned):
                return found
            answers.refuse()

    def _compare(self: Any, arguments: Arguments, what: Any, error: Exception | None, planned: bool) -> bool:
        self.__dict__["_calls"] += 1
        return check_call(self._place.control, self.__dict__["_calls"], arguments, what, error is not None, planned)

    # All members on every rank, where that is asked for

    def _members_of(self: Any, scores: Any) -> Tensor:
        """The scores of all members, [K, ...], in their order."""
        own = scores if isinstance(scores, Tensor) else torch.stack(list(scores))
        share = self._share
        shapes = [(count, *own.shape[1:]) for count in share.counts]
        return gathered(own[: share.count], shapes, self._place.members)

    def _combine(self: Any, columns: list[Any], combine: Any) -> Any:
        *leaves, spec = columns
        return pytree.tree_unflatten(
            [combined(combine, self._members_of(x)) if enters(x, combine) else self._alike(x) for x in leaves], spec
        )

    def _alike(self: Any, column: Any) -> Any:
        own = agreed(column)
        if isinstance(own, Tensor):
            every = self._place.members.gather(own, [own.shape] * self._place.members.size)
            return agreed(every)
        return own

    # One member a row

    def trajectory(self: Any, batch_size: int, generator: Any = None, *, samples: Tensor | None = None) -> Any:
        """Scope of one run of a sampler; the seed is the first rank's. See the ensemble's."""
        seed = seed_from(generator)
        seed = int(self._place.control.from_first(torch.tensor([seed]))[0])
        return cast(Any, super()).trajectory(batch_size, seed, samples=samples)

    def _drawn(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._arguments(args, kwargs)
        evaluation = self._begin(arguments)
        members = self._draws.members(self.rule, evaluation, arguments.batch_size)
        if evaluation.seed is None:  # else it is a function of what all have
            members = self._place.control.from_first(members)
        return self._by_rows(arguments, members)

    def _by_rows(self: Any, arguments: Arguments, members: Tensor) -> Any:
        """Each row by its member, on the rank that holds it; the ranks of "data" share a member's rows."""
        place, share, engine = self._place, self._share, self._engine
        owner = share.owner(members)
        parts = place.num_data
        rows = [list(torch.nonzero(owner == i).flatten().tensor_split(parts)) for i in range(place.members.size)]
        at = rows[place.members.rank][0 if place.data is None else place.data.rank]
        first = 0 if engine is not None and not engine.kind.own_weights else share.first
        by_rows = cast(Any, super())._by_rows

        def run() -> Any:
            spare = not len(at) and len(members) > 0  # a row for the outputs' shape
            part = arguments.selected(torch.zeros(1, dtype=torch.int64) if spare else at)
            if engine is None or not _apart(engine, arguments, part):  # members see the whole batch
                own = torch.full_like(members, share.first)
                own[at] = members[at]
                given, chosen = arguments, own - first
                found = by_rows(given, chosen)
                return pytree.tree_map(lambda x: x[at.to(x.device)] if isinstance(x, Tensor) and x.ndim else x, found)
            which = torch.full((1,), share.first) if spare else members[at]
            found = engine.evaluate_drawn(part, which - first)
            return (
                pytree.tree_map(lambda x: x[:0] if isinstance(x, Tensor) and x.ndim else x, found) if spare else found
            )

        arguments = self._replicated(arguments)
        found = self._together(arguments, ("rows", members.tolist()), run)
        here = 0 if place.data is None else place.data.rank
        order = torch.cat([rows[i][d] for d in range(parts) for i in range(place.members.size)])
        inverse = torch.argsort(order)

        def whole(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.ndim:
                return x
            shapes = [(len(rows[i][here]), *x.shape[1:]) for i in range(place.members.size)]
            some = gathered(x, shapes, place.members)
            if place.data is not None:
                shapes = [(sum(len(rows[i][d]) for i in range(place.members.size)), *x.shape[1:]) for d in range(parts)]
                some = gathered(some, shapes, place.data)
            return some.index_select(0, inverse.to(some.device))

        return pytree.tree_map(whole, found)

    # States and copies

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The stacks [K, ...] as DTensors, which ``torch.distributed.checkpoint`` writes and cuts anew."""
        found = cast(Any, super()).state_dict(*args, **kwargs)
        return states.as_whole(found, self._stacked(), self._place.mesh, self._share, self.num_members)

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load stacks [K, ...], of which each rank takes its own: DTensors, or tensors that every rank has whole."""
        own = states.of_rank(state_dict, self._stacked(), self._share, cast(Any, super()).state_dict())
        return cast(Any, super()).load_state_dict(own, *args, **kwargs)

    def _stacked(self: Any) -> frozenset[str]:
        engine = self._engine
        if engine is None or not engine.kind.own_weights:
            return frozenset()
        return frozenset(tensors_of(engine.network)) - engine.shared

    def extra_repr(self: Any) -> str:
        """What ``print`` shows above the network."""
        place, share = self._place, self._share
        where = f"{place.members.size} x {place.mesh.size(1)} ranks, here members {share.first} to "
        return f"{self.num_members} members, rule={self.rule}, {where}{share.first + share.held - 1}"
