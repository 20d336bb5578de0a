"""Methods of members that an ensemble has not: combined by the rule, or a setting for all of them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import reproducible
from fastens.aggregation import by_kernels, of_each_row
from fastens.engine.compiled import drawn_pass
from fastens.engine.entering import entering
from fastens.engine.row_by_row import each_member
from fastens.internal import (
    arguments_of,
    combine,
    draws_of,
    engine_of,
    forget,
    output_of_member,
    prediction_of,
    settings_of,
    take,
)
from fastens.network.member_tables import called, settle
from fastens.network.state import Rollback
from fastens.ops.aggregate import aggregate

if TYPE_CHECKING:
    from fastens.engine.engine import Engine
    from fastens.ensemble import Ensemble


def call_method(ensemble: Ensemble, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the members that the ensemble has not: combined by the rule, or a setting for all of them.

    A method that is called with tensors is evaluated for all members, and what differs between them is combined as the
    results of ``forward`` are. One that is not is called on the network of all members, to set what it sets; where that
    fails, as where it computes new weights from those of each member, on every member, which the ensemble takes anew.
    """
    engine = engine_of(ensemble)
    leaves = pytree.tree_leaves((args, kwargs))
    if name.startswith("forward_"):  # forward_with_cond_scale and its like call forward: the ensemble's
        member = next(ensemble.network.children()) if engine is None else ensemble.network
        return getattr(type(member), name)(ensemble, *args, **kwargs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        if engine is None:
            first, *_ = [getattr(member, name)(*args, **kwargs) for member in ensemble.network.children()]
            return first
        if any(map(any, engine.own_states()[0])):
            result = set_members(engine, name, *args, **kwargs)
            return ensemble if result is engine.views[0] else result
        before = Rollback(ensemble.network)
        try:
            result = getattr(ensemble.network, name)(*args, **kwargs)
        except Exception:
            if not before.restore() or not engine.kind.own_weights:
                raise
            return change_members(ensemble, name, *args, **kwargs)
        forget(ensemble)
        return ensemble if result is ensemble.network else result
    if torch.compiler.is_compiling():  # whether members return the same is a question of values
        return drawn_pass(functools.partial(_combined, ensemble, name), args, kwargs)
    return _combined(ensemble, name, args, kwargs)


def _combined(ensemble: Ensemble, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a method that is called with tensors gives for all members, combined where it differs."""
    engine = engine_of(ensemble)
    arguments = arguments_of(ensemble, args, kwargs)
    # members that are looked into take other paths, such as torch's for attention: only where the answer matters
    with nullcontext([]) if keeps_equal(ensemble) else entering() as parameters:
        if engine is None:
            call = functools.partial(output_of_member, ensemble, method=name)
            outputs = each_member(ensemble.network, arguments, call, name)
        else:
            outputs = engine.evaluate(arguments, ensemble.training, name)
    return combine(ensemble, outputs, lambda scores: alike_or_combined(ensemble, name, scores, bool(parameters)))


def set_members(engine: Engine, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method on every member of a loop, which have state of their own; return what the first returns."""
    with called():
        first, *_ = [getattr(view, name)(*args, **kwargs) for view in engine.views]
    for view in engine.views:
        settle(view, keeps=True)
    return first


def change_members(ensemble: Ensemble, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method on every member, and make the ensemble of what they have become; its parameters are new ones.

    Returns:
        What the method returned, the ensemble where that was the member.
    """
    members = list(ensemble.members)
    first, *_ = [getattr(member, name)(*args, **kwargs) for member in members]
    result = ensemble if first is members[0] else first
    take(ensemble, members)
    return result


def alike_or_combined(ensemble: Ensemble, name: str, scores: Any, parameters: bool) -> Tensor:
    """Aggregate what a method returns; what all members agree on, and no parameter entered, is returned unchanged."""
    first = scores[0]
    if not parameters and all(torch.equal(first, other) for other in scores[1:]):
        return first.clone()
    return aggregated(ensemble, name, scores)


def keeps_equal(ensemble: Ensemble) -> bool:
    """Whether the rule's aggregate of equal values is that value, as it is of no sum."""
    rule, values = ensemble.rule, torch.tensor([1.0, -2.0])
    if rule.random or rule.needs_noise_level:
        return True
    try:
        return torch.allclose(aggregate(values.expand(ensemble.num_members, 2), rule, backend="reference"), values)
    except Exception:  # a rule of a user's takes other shapes
        return False


def aggregated(ensemble: Ensemble, name: str, scores: Any) -> Tensor:
    """The aggregate of what the members return, without a conversion of parameterisations.

    Raises:
        ValueError: under a rule that draws members for calls of ``forward``, or where rows have members.
    """
    rule = ensemble.rule
    if draws_of(ensemble).assignment() is not None:
        raise ValueError(f"{name}: members differ, and rows have members of their own in calls of forward only")
    if rule.random:
        raise ValueError(
            f"{name}: members differ, and rule {rule.name!r} draws them for calls of forward only; set another rule"
        )
    settings = settings_of(ensemble)
    combine = functools.partial(aggregate, rule="mean" if rule.needs_noise_level else rule, backend=settings["backend"])
    if reproducible.enabled() and not by_kernels(rule, prediction_of(ensemble), settings) and scores[0].ndim:
        combine = of_each_row([combine] * len(scores[0]))
    return combine(scores)
