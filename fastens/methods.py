"""Methods of members that an ensemble has not: combined by the rule, or a setting for all of them."""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import reproducible
from fastens.aggregation import by_kernels, of_each_row
from fastens.engine.compiled import drawn_pass
from fastens.engine.entering import entering
from fastens.engine.leaves import VALUES
from fastens.engine.row_by_row import each_member
from fastens.fold.tensor import MemberTensor, tensors_of
from fastens.holders import Contexts, Holders, in_turn, is_context
from fastens.internal import (
    arguments_of,
    combine,
    draws_of,
    engine_of,
    output_of_member,
    prediction_of,
    settings_of,
    take,
)
from fastens.network.gradients import gradient_of, set_gradient
from fastens.network.rollback import Rollback
from fastens.network.tables import listed_as_read
from fastens.ops.aggregate import aggregate
from fastens.outputs import agreed, columns, is_scores
from fastens.through_forward import ReadsParts, through_forward

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


def call_method(ensemble: Ensemble, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the members that the ensemble has not: combined by the rule, or a setting for all of them.

    A method that is called with tensors is evaluated for all members, and what differs between them is combined as the
    results of ``forward`` are. One that is not is called on the network of all members, to set what it sets; where that
    fails, as where it computes new weights from those of each member, on every member, which the ensemble takes anew.
    Of the context managers and the generators that it returns, the code runs later: for all members too.
    One such as ``forward_with_cfg``, which needs a member's forward alone, guides the ensemble's.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    with suppress(ReadsParts):
        return through_forward(ensemble, name, args, kwargs, call_method)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return _called(ensemble, name, args, kwargs)
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


def _called(ensemble: Ensemble, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method without tensors on whatever holds the members' Python state."""
    holders, network = Holders(ensemble), ensemble.network
    if holders.modules != [network]:
        with holders.running(whole=True):
            return returned(holders, name, _called_on_each(holders, name, args, kwargs))
    engine, before = engine_of(ensemble), Rollback(network)
    try:
        with holders.running(), listed_as_read(), before:
            result = getattr(network, name)(*args, **kwargs)
        if any(isinstance(x, torch.optim.Optimizer) for x in pytree.tree_leaves(result)):  # it is to train the stacks
            with holders.running():
                result = getattr(network, name)(*args, **kwargs)
    except Exception:
        if not before.restore() or engine is None or not engine.kind.own_weights:
            raise
        return change_members(ensemble, name, *args, **kwargs)
    if engine is not None and before.changed_inside():
        engine.guards.barrier.wrote()  # which compiled graphs are told of
    return returned(holders, name, [result])


def _called_on_each(holders: Holders, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the method returns for each of the members, which begin with the same parameters trained and frozen.

    Raises:
        ValueError: they end with others, where stacks hold those of all members.
    """
    folded = engine_of(holders.ensemble) is not None
    parameters = dict(holders.ensemble.network.named_parameters()) if folded else {}
    results, before, first = [], {n: p.requires_grad for n, p in parameters.items()}, None
    for each in holders.modules:
        for n, trained in before.items():
            parameters[n].requires_grad_(trained)
        results.append(getattr(each, name)(*args, **kwargs))
        found = {n: p.requires_grad for n, p in parameters.items()}
        other = next((n for n in found if first is not None and found[n] is not first[n]), None)
        if other is not None:
            raise ValueError(
                f"{name}: {other} is trained in some members and frozen in others, and it is one parameter"
            )
        first = found
    return results


def returned(holders: Holders, name: str, results: list[Any]) -> Any:
    """One value of what a method without tensors gave for all members.

    The ensemble where that is the member, and what is made of scores as a result of ``forward`` is: in the network of
    all members these are tensors with a value for each. Objects are the first member's.

    Raises:
        TypeError: numbers, tensors or the like in which members differ, and which no rule combines.
    """
    ensemble, first = holders.ensemble, results[0]
    if first is holders.modules[0]:
        return ensemble
    if is_context(first):
        return Contexts(holders, results, functools.partial(returned, holders, name))
    if isinstance(first, types.GeneratorType):
        return in_turn(holders, results, functools.partial(returned, holders, name))
    if len(results) == 1:  # of the network
        return pytree.tree_map_only(MemberTensor, lambda x: _of_network(ensemble, name, x), first)
    found = columns(results)
    if not any(isinstance(x, Tensor) and is_scores(x) for x in pytree.tree_leaves(first)):
        for column in found[:-1]:
            if isinstance(column[0], (Tensor, *VALUES)):  # other objects are the first member's
                agreed(column)
        return first
    return combine(ensemble, found, lambda scores: alike_or_combined(ensemble, name, scores, False))


def _of_network(ensemble: Ensemble, name: str, value: MemberTensor) -> Tensor:
    """What a method of the network of all members returned: its stacks as they are, else combined."""
    stack = value.stack
    if any(stack is held for held in (*ensemble.network.parameters(), *ensemble.network.buffers())):
        return stack
    return combine(ensemble, [stack, pytree.tree_structure(0)], lambda x: alike_or_combined(ensemble, name, x, False))


def change_members(ensemble: Ensemble, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method on every member, and make the ensemble of what they have become.

    Parameters stay the objects that they are, with their gradients, but for those of another shape, dtype or device.

    Returns:
        What the method returned, the ensemble where that was the member; see :func:`returned`.
    """
    members, stacks = list(ensemble.members), tensors_of(ensemble.network)
    _give_gradients(members, stacks)
    results = [getattr(member, name)(*args, **kwargs) for member in members]
    value = returned(Holders(ensemble, members), name, results)
    take(ensemble, members, stacks)
    _take_gradients(ensemble, members)
    return value


def _give_gradients(members: list[nn.Module], stacks: dict[str, Tensor]) -> None:
    """Give copies of members the gradients of the stacks; of what all share, each has the whole."""
    for k, member in enumerate(members):
        for name, own in member.named_parameters():
            stack = stacks[name]
            grad = stack.grad if stack.shape == own.shape else gradient_of(stack, k)
            own.grad = None if grad is None else grad.clone()


def _take_gradients(ensemble: Ensemble, members: list[nn.Module]) -> None:
    """Give an ensemble the gradients that copies of its members have."""
    if engine_of(ensemble) is None:
        for own, member in zip(ensemble.network.children(), members, strict=True):
            for name, parameter in own.named_parameters():
                parameter.grad = member.get_parameter(name).grad
        return
    for name, stack in ensemble.network.named_parameters():
        owns = [member.get_parameter(name) for member in members]
        shared = stack.shape == owns[0].shape
        stack.grad = owns[0].grad if shared else None
        for k, own in enumerate(() if shared else owns):
            set_gradient(stack, k, None if own.grad is None else own.grad.to(stack))


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
