"""Whether an optimizer takes, on the stacks of an ensemble, the steps that it takes on each member apart.

An optimizer that treats every number alone does. One that looks at a whole tensor (its norm, its factors, how many
dimensions it has) or at all tensors finds K members where it should find one. What torch has is known; others are tried
on small tensors of two members, or of the only one.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.internal import engine_of
from fastens.network.state import random_kept

_BY_NUMBER = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD SparseAdam"  # and not Adafactor, Muon
    ).split()
)
_SIZES = (4, 3, 2, 3, 2)  # of the tensors that others are tried on
_STEPS = 3
_SAME = 1e-6  # of the largest change, in float64
_PLAIN = (bool, int, float, complex, str, type(None))
Ranks = list[tuple[int, ...]]  # numbers of dimensions of members' parameters, by group

_CHECKED: weakref.WeakKeyDictionary[torch.optim.Optimizer, Ranks] = weakref.WeakKeyDictionary()


def check_optimizer(ensemble: Ensemble, optimizer: torch.optim.Optimizer) -> None:
    """Raise where an optimizer's steps would not be those of K optimizers, each of one member.

    :func:`fastens.training.training_step` asks this; a loop of your own may once, when the optimizer is made. Torch's
    own that treat every number alone pass. Others are made again with the same options and tried on small tensors:
    steps on two members at once are compared with steps on each. Where one cannot be made so, or draws random numbers,
    a warning says that nothing is known of it.

    Parameters that are one object in all members, which no member has its own of, are not asked about.

    Args:
        ensemble: of K members.
        optimizer: of its parameters, among others.

    Raises:
        TypeError: its steps mix the members, or depend on how many dimensions a parameter has; it needs a closure.
        ValueError: it holds no parameter of the ensemble.
    """
    engine = engine_of(ensemble)
    shared = frozenset[str]() if engine is None else engine.shared
    every = {id(p) for p in ensemble.network.parameters()}
    if not any(id(p) in every for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds no parameter of the ensemble, whose weights are copies of the members': make it of "
            "ensemble.parameters()"
        )
    own = {id(p): p.ndim - (engine is not None) for n, p in ensemble.network.named_parameters() if n not in shared}
    ranks = [tuple(sorted({own[id(p)] for p in g["params"] if id(p) in own})) for g in optimizer.param_groups]
    if type(optimizer) in _BY_NUMBER or not any(ranks) or _CHECKED.get(optimizer) == ranks:
        return
    name = type(optimizer).__name__
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError as error:
        raise TypeError(
            f"{name}.step needs a closure, which evaluates all members, and chooses one step for all of them: use an "
            "optimizer that treats every number alone, as AdamW"
        ) from error
    apart = _apart(optimizer, ranks, min(ensemble.num_members, 2), stacked=engine is not None)
    if apart is None:
        warnings.warn(
            f"fastens: whether the steps of {name} on stacks of members are those of separate training is not known, "
            "as it cannot be made again to try, or draws random numbers: they are where it treats every number alone, "
            "and not where it looks at norms, factors or dimensions of a whole tensor",
            stacklevel=3,
        )
    elif apart > _SAME:
        raise TypeError(
            f"{name} computes a step from a whole tensor, and a stack holds all members: its steps are not those of "
            f"separate training, from which they are {apart:.1e} apart; use one that treats every number alone, as "
            "AdamW"
        )
    _CHECKED[optimizer] = ranks


def _apart(optimizer: torch.optim.Optimizer, ranks: Ranks, count: int, stacked: bool) -> float | None:
    """How far steps on members at once are from steps on each, of the largest; none where that cannot be told.

    Args:
        optimizer: made again for it, and left as it is.
        ranks: of members' parameters, by group.
        count: of members, one or two.
        stacked: whether all members' are one tensor, or each is its own.
    """
    make, generator = _maker(optimizer), torch.Generator().manual_seed(0)

    def drawn_of(size: float) -> list[list[Tensor]]:
        """Numbers of the members by group, of which those of the second are larger."""
        shapes = [[_SIZES[:rank] for rank in group] for group in ranks]
        sizes = torch.tensor([1.0, size], dtype=torch.float64)
        drawn = torch.randn(2, math.prod(_SIZES), dtype=torch.float64, generator=generator) * sizes[:, None]
        return [[drawn[:count, : math.prod(shape)].reshape(count, *shape) for shape in group] for group in shapes]

    begins, gradients = drawn_of(5.0), [drawn_of(30.0) for _ in range(_STEPS)]

    def moved(parts: list[Any]) -> list[Tensor]:
        """By how much an optimizer moves parameters, each of which holds one of these parts of the members."""
        held = [[nn.Parameter(x[part].clone()) for x in group for part in parts] for group in begins]
        own = make(held)
        for step in gradients:
            for group, given in zip(held, step, strict=True):
                for p, gradient in zip(group, (x[part] for x in given for part in parts), strict=True):
                    p.grad = gradient.clone()
            inspect.unwrap(type(own).step)(own)  # past hooks, which are to see the user's own steps
        before = [x[part] for group in begins for x in group for part in parts]
        return [p - x for p, x in zip((p for group in held for p in group), before, strict=True)]

    with random_kept(), torch.no_grad():
        state = torch.get_rng_state()
        try:
            ours = moved([slice(None)]) if stacked else moved(list(range(count)))
        except Exception:  # whatever it is that keeps it from being made or run so
            return None
        try:
            theirs = [torch.stack(each) for each in zip(*(moved([k]) for k in range(count)), strict=True)]
        except Exception:  # it takes no parameter of such a shape
            return math.inf
        if not torch.equal(torch.get_rng_state(), state):
            return None
    ours = ours if stacked else [torch.stack(ours[i : i + count]) for i in range(0, len(ours), count)]
    errors = [(a - b).reshape(count, -1).abs().amax(1) for a, b in zip(ours, theirs, strict=True)]
    sizes = [b.reshape(count, -1).abs().amax(1) for b in theirs]
    apart = float((torch.stack(errors) / torch.stack(sizes)).max())
    return apart if math.isfinite(apart) else None


def _maker(optimizer: torch.optim.Optimizer) -> Callable[[list[list[nn.Parameter]]], torch.optim.Optimizer]:
    """Makes optimizers as one was made, with the options of its groups, for other parameters by group."""
    kind: Any = type(optimizer)
    accepted = inspect.signature(kind).parameters
    said = {**vars(optimizer), **getattr(optimizer, "defaults", {})}
    options = {name: said[name] for name in accepted if name in said and _is_plain(said[name])}
    groups = [
        {n: x for n, x in group.items() if n not in ("params", "param_names")}
        | ({"lr": 0.1} if "lr" in group else {})  # which a schedule may begin at zero
        for group in optimizer.param_groups
    ]

    def make(parameters: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
        pairs = zip(copy.deepcopy(groups), parameters, strict=True)  # in which some optimizers count
        return kind([{**group, "params": own} for group, own in pairs if own], **options)

    return make


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))
