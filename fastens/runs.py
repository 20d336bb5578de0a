"""Whole runs of every member: a sampler's own code is run once, with the member as a hidden dimension."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fastens.device import device_of
from fastens.draws import numbers_of
from fastens.engine.arguments import PerMember
from fastens.engine.leaves import same
from fastens.ensemble import Ensemble
from fastens.fold.dispatch import RANDOM, Fold, run_common
from fastens.fold.nested import leaves_of, mapped, plain
from fastens.fold.slices import entry_by_entry
from fastens.fold.tensor import Hidden, MemberTensor, NotFoldable, member_valued
from fastens.fold.writes import NeedsWrappers, promote, writes_to
from fastens.generators import GeneratorStates
from fastens.internal import combine, draws_of, outputs_of
from fastens.sampler_call import SamplerCall

_BY_SHAPE = frozenset(("rand_like", "randn_like", "randint_like"))  # no value of their argument matters


def sample_members(
    sampler: Any,
    members: int | Sequence[int] | None = None,
    num_samples: int = 1,
    *,
    ensemble: Ensemble | None = None,
    shared_noise: bool = True,
    branch_at: int | None = None,
    generator: torch.Generator | int | None = None,
    **arguments: Any,
) -> Any:
    """Run whole trajectories, N of each member, at the price of one run: one pass of all members an evaluation.

    The sampler is not modified. Its own code runs once, for N samples, and every tensor in it that depends on the
    members has a value for each: what it draws, steps by and decides is what it would for each member alone. With
    ``shared_noise`` member k's samples are those that ``sampler`` itself gives with member k in the ensemble's place,
    from the same state of its generators. Where its Python reads values that differ between members, as adaptive
    solvers do, its runs are made one after the other, with a warning. Gradients are off, as in pipelines.

    Args:
        sampler: a diffusers pipeline or a :class:`fastens.samplers.Sampler` of the ensemble, or a function that calls
            it: ``sampler(num_samples, **arguments)`` -> samples [N, ...].
        members: which members, or how many of the first; none for all K.
        num_samples: N, the samples of each member.
        ensemble: that a function calls; pipelines and samplers say it.
        shared_noise: all members start from the same noise, and where the sampler draws more, get the same; else
            each has its own.
        branch_at: how many evaluations are common to all, under the ensemble's rule and from shared noise, before each
            member goes its own way; none for none. A :class:`fastens.PerMember` is each member's own in them, too.
        generator: of all noise, or a seed: given to samplers that take one (``generator=``, ``seed=``); for others
            torch's global generator is seeded from it, for the time of the run.
        **arguments: of the sampler's call, as for one run of N samples; a :class:`fastens.PerMember` among them is
            each member's own.

    Returns:
        [K, N, ...]; of a pipeline its samples, as an array unless ``output_type`` says otherwise; other structures keep
        their structure.

    Raises:
        TypeError: no ensemble; a sampler that cannot be called, numbers of another kind.
        ValueError: members that there are not, N below 1, ``branch_at`` outside the evaluations, a rule that draws
            members before it; arguments of the members' own before it where the runs cannot be made together; runs
            that return other shapes or structures.
        RuntimeError: rows have members of their own already.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"sample_members: num_samples is a {type(num_samples).__name__}, expected a number of samples")
    if num_samples < 1:
        raise ValueError(f"sample_members: num_samples is {num_samples}, expected at least one sample of each member")
    if branch_at is not None and branch_at < 0:
        raise ValueError(f"sample_members: branch_at is {branch_at}, expected a number of evaluations")
    call = SamplerCall.of(sampler, ensemble, num_samples, arguments)
    rule = call.ensemble.rule
    if branch_at and rule.random:
        raise ValueError(
            f"sample_members: rule {rule.name!r} draws members, and evaluations before branch_at are of all; take "
            "another rule, as the mean"
        )
    own = [x for x in pytree.tree_leaves(arguments) if isinstance(x, PerMember)]
    for each in own:
        each.check(call.ensemble.num_members)
    chosen = _chosen(members, call.ensemble.num_members)
    asked = None
    if own and branch_at:  # the rule asks all members, each by its own arguments
        asked, chosen = chosen, [*range(call.ensemble.num_members)]
    settings = call, chosen, num_samples, shared_noise, branch_at or 0
    states = GeneratorStates()
    with torch.no_grad(), call.seeded(generator):
        try:
            return _together(settings, states, asked)
        except NotFoldable as error:
            if asked is not None:
                raise ValueError(
                    f"sample_members: the runs must be made one after the other, because {error}; but up to branch_at "
                    "each evaluation needs all members' own arguments (PerMember); pass arguments that all share, or "
                    "no branch_at"
                ) from error
            states.restore()
            warnings.warn(f"fastens: the members' runs are made one after the other, because {error}", stacklevel=2)
            return _one_by_one(settings, states)


_Settings = tuple[SamplerCall, list[int], int, bool, int]  # the first arguments of _Together


def _together(settings: _Settings, states: GeneratorStates, asked: list[int] | None) -> Any:
    try:
        return _Together(*settings, states, asked).result()
    except NeedsWrappers:  # a tensor that is common receives what differs: all must be wrappers from birth
        states.restore()
        return _Together(*settings, states, asked, wrapped=True).result()


def _one_by_one(settings: _Settings, states: GeneratorStates) -> Any:
    call, chosen, num_samples, shared, branch_at = settings
    results = []
    for i, k in enumerate(chosen):
        if shared and i:
            states.restore()
        results.append(_Alone(call, k, 0 if shared else i * num_samples, branch_at, states).result())

    if call.rows_last and isinstance(results[0], list):  # images
        return results

    def join(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.stack(parts)
        if isinstance(parts[0], np.ndarray):
            return np.stack(parts)
        return parts[0] if all(same(parts[0], part) for part in parts) else list(parts)

    try:
        return pytree.tree_map(join, *results)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"sample_members: the members' runs return what cannot be stacked ({error}); return samples of one shape"
        ) from error


class _Assigned:
    """What the ensemble does in a run in place of its rule."""

    def __init__(self, call: SamplerCall, branch_at: int) -> None:
        self._call, self._branch_at = call, branch_at
        self._evaluations = 0

    @property
    def branched(self) -> bool:
        """Whether the members are on their own by now."""
        return self._evaluations >= self._branch_at

    def evaluate(self, ensemble: Ensemble, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate the ensemble where the sampler calls it."""
        common = not self.branched
        self._evaluations += 1
        with _suspended(self), draws_of(ensemble).unassigned():
            return self._evaluated(ensemble, args, kwargs, common)

    def _evaluated(self, ensemble: Ensemble, args: tuple[Any, ...], kwargs: dict[str, Any], common: bool) -> Any:
        raise NotImplementedError

    def result(self) -> Any:
        """Run the sampler."""
        ensemble, arguments = self._call.ensemble, pytree.tree_map(self._argument, self._call.arguments)
        with draws_of(ensemble).assigned(self, ensemble.rule), self:  # pyright: ignore[reportGeneralTypeIssues]  # both are contexts
            output = self._call.samples(self._call.function(**arguments))
        if self._branch_at and not self._evaluations > self._branch_at:
            raise ValueError(
                f"sample_members: branch_at is {self._branch_at}, but the sampler evaluated the ensemble "
                f"{self._evaluations} times; expected fewer"
            )
        return output

    def _argument(self, x: Any) -> Any:
        return x


class _Together(_Assigned, Fold):
    """The runs of all members at once: a pass over the sampler's own code.

    Those that were asked for, of the chosen, are its result.
    """

    def __init__(
        self,
        call: SamplerCall,
        chosen: list[int],
        num_samples: int,
        shared: bool,
        branch_at: int,
        states: GeneratorStates,
        asked: list[int] | None = None,
        wrapped: bool = False,
    ) -> None:
        Fold.__init__(self, Hidden(len(chosen), len(chosen)), wrapped=wrapped)
        _Assigned.__init__(self, call, branch_at)
        self._chosen, self._num_samples, self._shared, self._states = chosen, num_samples, shared, states
        self._asked = [*range(len(chosen))] if asked is None else asked
        self._ended = False

    def _argument(self, x: Any) -> Any:
        return self.wrap(x.stack[self._chosen]) if isinstance(x, PerMember) else x

    def result(self) -> Any:
        """Run the sampler; [K, N, ...]."""
        asked, count = self._asked, len(self._chosen)

        def whole(x: Any) -> Any:
            if isinstance(x, np.ndarray) and self._ended:
                return x.reshape(count, -1, *x.shape[1:])[asked]
            if not isinstance(x, Tensor):
                return x
            return self.stack(x)[asked] if member_valued(x) else plain(x).expand(len(asked), *x.shape).clone()

        output = super().result()
        if self._ended and isinstance(output, list):  # images
            rows = len(output) // count
            return [output[k * rows : (k + 1) * rows] for k in asked]
        return pytree.tree_map(whole, output)

    def _evaluated(self, ensemble: Ensemble, args: tuple[Any, ...], kwargs: dict[str, Any], common: bool) -> Any:
        if self._ended:
            raise NotFoldable("the sampler goes on after it made an array of its samples")
        chosen = torch.tensor(self._chosen, device=ensemble.device)
        place = {k: i for i, k in enumerate(self._chosen)}  # members that were not asked for see any other's arguments
        entries = torch.tensor([place.get(k, 0) for k in range(ensemble.num_members)], device=ensemble.device)
        every = self._chosen == [*range(ensemble.num_members)]

        def given(x: Any) -> Any:
            if not member_valued(x):
                return plain(x)
            stack = self.stack(x)
            return PerMember.of(stack if every else stack[entries.to(stack.device)])

        def own(scores: Any) -> Tensor:
            stack = scores if isinstance(scores, Tensor) else torch.stack(scores)
            return self.wrap(stack if every else stack[chosen.to(stack.device)])

        args, kwargs = pytree.tree_map(given, (args, kwargs))
        if common:
            return self.common(ensemble(*args, **kwargs))
        return combine(ensemble, outputs_of(ensemble, args, kwargs), own)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sharing = self._shared or not self.branched
        if func in RANDOM:
            self._states.note(kwargs.get("generator"))
            if sharing:
                return self._drawn_alike(func, args, kwargs)
        elif not sharing:
            count = self._num_samples
            args, kwargs = _renumbered(
                func, args, kwargs, lambda x: self.wrap(torch.stack([x + i * count for i in range(len(self._chosen))]))
            )
        if self._call.rows_last and func is Tensor.numpy and member_valued(args[0]):
            self._ended = True
            return self.stack(args[0]).flatten(0, 1).numpy()
        return super().__torch_function__(func, types, args, kwargs)

    def _drawn_alike(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Draw once for all members; where the draw depends on values, draw for each from the same state."""
        leaves = list(leaves_of((args, kwargs)))
        if not any(map(member_valued, leaves)):
            return run_common(self, func, args, kwargs, any(type(x) is MemberTensor for x in leaves))
        if func.__name__ in _BY_SHAPE:
            first = mapped(lambda x: self.stack(x)[0] if member_valued(x) else plain(x), (args, kwargs))
            return self.common(func(*first[0], **first[1]))
        if writes_to(func, args, kwargs) and not member_valued(args[0]):
            promote(self, args[0])
        source = kwargs.get("generator") or device_of(self.device_type(args)).generator()
        state, ends = source.get_state(), []

        @functools.wraps(func)
        def again(*args: Any, **kwargs: Any) -> Any:
            source.set_state(state)
            result = func(*args, **kwargs)
            ends.append(source.get_state())
            return result

        result = entry_by_entry(self, again, args, kwargs)
        if any(not torch.equal(end, ends[0]) for end in ends):
            raise NotFoldable(f"{func.__name__} draws more numbers for one member than for another")
        return result


class _Alone(_Assigned, TorchFunctionMode):
    """The run of one member, its rows assigned to it."""

    def __init__(
        self, call: SamplerCall, member: int, first_sample: int, branch_at: int, states: GeneratorStates
    ) -> None:
        TorchFunctionMode.__init__(self)
        _Assigned.__init__(self, call, branch_at)
        self._member, self._first_sample, self._states = member, first_sample, states

    def _argument(self, x: Any) -> Any:
        return x.stack[self._member] if isinstance(x, PerMember) else x

    def _evaluated(self, ensemble: Ensemble, args: tuple[Any, ...], kwargs: dict[str, Any], common: bool) -> Any:
        if common:
            return ensemble(*args, **kwargs)
        with ensemble.assigned([self._member]):
            return ensemble(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM:
            self._states.note(kwargs.get("generator"))
        if self._first_sample and self.branched:
            args, kwargs = _renumbered(func, args, kwargs, lambda x: x + self._first_sample)
        return func(*args, **kwargs)


def _renumbered(func: Any, args: Any, kwargs: Any, other: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The arguments of one of our ops, whose noise is that of numbered samples, with other numbers."""
    if not isinstance(func, torch._ops.OpOverloadPacket) or not str(func).startswith("fastens."):
        return args, kwargs
    names = [argument.name for argument in func.default._schema.arguments]
    at = names.index("samples") if "samples" in names else len(args)
    given = [other(plain(x)) if i == at and isinstance(x, Tensor) else x for i, x in enumerate(args)]
    return given, {n: other(plain(x)) if n == "samples" and isinstance(x, Tensor) else x for n, x in kwargs.items()}


@contextlib.contextmanager
def _suspended(mode: Any) -> Iterator[None]:
    """Leave a mode, and those inside it, for the time of an evaluation of the ensemble."""
    left: list[TorchFunctionMode] = []
    while not left or left[-1] is not mode:
        left.append(_pop_mode())
    try:
        yield
    finally:
        for each in reversed(left):
            _push_mode(each)


def _chosen(members: Any, num_members: int) -> list[int]:
    """The members that run, by number."""
    if members is None:
        return [*range(num_members)]
    if isinstance(members, int) and not isinstance(members, bool):
        if not 1 <= members <= num_members:
            raise ValueError(f"sample_members: members is {members}, expected 1 to {num_members}, or which they are")
        return [*range(members)]
    return numbers_of(members, num_members, "sample_members").tolist()
