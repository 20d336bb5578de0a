"""Spreading an ensemble, or members that nobody has read yet, over a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastens import rules
from fastens.distributed.ensemble import over
from fastens.distributed.exchange import RanksDiffer
from fastens.distributed.place import Place
from fastens.distributed.shares import Share, check_alike, checksum, facts_of
from fastens.engine.engine import Engine
from fastens.ensemble import Ensemble
from fastens.internal import base_of, engine_of, hold_modules, hold_stacks, modules_apart, settings_of, why_looped
from fastens.members import copied
from fastens.network.stacking import Stacked, check_members, stack_members, tensors_of
from fastens.settings import check_settings


def distribute(
    ensemble: Ensemble | Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    batch: str = "global",
    timeout: float = 300.0,
    **options: Any,
) -> Any:
    """Spread an ensemble over a mesh of dimensions ("member", "data"). All ranks make the same calls.

    What every rank gets from a call is what the ensemble would return in one process, for the whole batch. It is a
    module that a sampler calls as it called the ensemble: the same program runs on all ranks, from the same seeds.
    Whoever is called with another batch, fails or dies makes all ranks raise.

    Args:
        ensemble: the ensemble, which each rank has whole and may drop; or its members, as
            :func:`fastens.load_members` names them, of which each rank reads its own only.
        mesh: ``init_device_mesh(kind, (m, d), mesh_dim_names=("member", "data"))``; K members need not divide by m.
        batch: ``"global"``: every rank is called with the same batch, whose rows are spread over "data"; ``"local"``:
            each rank of "data" has a batch of its own, as large as it likes, and those of one place in it the same.
        timeout: seconds that a rank is waited for.
        **options: of :class:`fastens.Ensemble`, where members are given.

    Raises:
        TypeError: neither an ensemble nor members, a mesh that is none.
        ValueError: other dimensions of the mesh.
        RanksDiffer: versions, code, weights or settings differ between ranks.
        RankLost: a rank did not answer.
    """
    if not isinstance(mesh, DeviceMesh) or tuple(mesh.mesh_dim_names or ()) != ("member", "data"):
        raise ValueError(
            "distribute: expected a mesh of dimensions ('member', 'data'), as of torch.distributed.device_mesh."
            "init_device_mesh('cuda', (2, 4), mesh_dim_names=('member', 'data'))"
        )
    if batch not in ("global", "local"):
        raise ValueError(f"distribute: batch {batch!r} is unknown, expected 'global' or 'local'")
    place = Place(mesh, batch, timeout)
    if isinstance(ensemble, Ensemble):
        if options:
            raise TypeError(f"distribute: {', '.join(options)} belong to the ensemble; give them to it")
        return _of_ensemble(ensemble, place)
    check_members(ensemble)
    return _of_members(ensemble, place, **options)


def _of_ensemble(ensemble: Ensemble, place: Place) -> Any:
    share = Share(ensemble.num_members, place.members.size, place.members.rank)
    engine = engine_of(ensemble)
    whole = [t for _, t in sorted(ensemble.state_dict().items())]
    member = next(ensemble.network.children()) if engine is None else engine.skeleton
    facts = facts_of(member, ensemble.num_members, settings_of(ensemble), ensemble.rule)
    check_alike(place.control, {**facts, "the weights": checksum(whole)})
    made = over(base_of(ensemble), ensemble.num_members, ensemble.rule, settings_of(ensemble), place, share)
    if engine is None:
        modules = [copied(each) for each in modules_apart(ensemble).get()[share.slice]]
        hold_modules(made, modules, why_looped(ensemble))
    else:
        if engine.remember:
            raise ValueError("distribute: the members wrote to themselves and are looped; distribute them before")
        hold_stacks(made, Stacked(engine.skeleton, stacks_of(engine, share), engine.shared, engine.overlapping))
    made.train(ensemble.training)
    return made


def stacks_of(engine: Engine, share: Share) -> dict[str, Tensor]:
    """Copies of the tensors of some members; of all where these are masks."""
    stacks = {}
    for name, stack in tensors_of(engine.network).items():
        whole = name in engine.shared or not engine.kind.own_weights
        own = (stack.detach() if whole else stack.detach()[share.slice]).clone(memory_format=torch.preserve_format)
        stacks[name] = nn.Parameter(own, stack.requires_grad) if isinstance(stack, nn.Parameter) else own
    return stacks


def _of_members(members: Sequence[nn.Module], place: Place, rule: Any = "mean", **options: Any) -> Any:
    if options.keys() & {"device", "dtype"}:
        raise TypeError("distribute: say device= and dtype= of the members: fastens.load_members(..., device=...)")
    named = ("engine", "backend", "max_fold", "prediction", "aggregate_in", "schedule")
    unknown = sorted(options.keys() - {*named})
    if unknown:
        raise TypeError(f"distribute: unknown option {', '.join(unknown)}; expected some of {', '.join(named)}")
    defaults = {"engine": "auto", "backend": "auto", **dict.fromkeys(named[2:])}
    settings = check_settings(**{**defaults, **options})
    share = Share(len(members), place.members.size, place.members.rank)
    held = list(members[share.slice])
    facts = facts_of(held[0], len(members), settings, rules.get(rule))
    check_alike(place.control, facts)
    with torch.inference_mode(False):
        stacked = stack_members(held)
        stacks, shared = stacked.stacks, _shared_by_all(place, stacked.stacks, stacked.shared, share.held)
    own = {name: checksum([stack]) for name, stack in stacks.items() if name in shared}
    check_alike(place.control, {"the tensors that members share": own})
    if place.data is not None and place.data.size > 1:
        numbers = {"the weights": checksum(stacks[name] for name in sorted(stacks))}
        _check_replicas(place, share, numbers)
    made = over(Ensemble, len(members), rule, settings, place, share)
    hold_stacks(made, stacked._replace(shared=shared))
    made.train(held[0].training)
    return made


def _check_replicas(place: Place, share: Share, facts: dict[str, Any]) -> None:
    """Raise on every rank where two that hold the same members have other weights."""
    every = place.control.objects((share.first, facts["the weights"]))
    weights: dict[int, int] = {}
    for rank, (first, number) in zip(place.control.ranks, every, strict=True):
        if weights.setdefault(first, number) != number:
            raise RanksDiffer(f"distribute: the weights of member {first} on rank {rank} are others than elsewhere")


def _shared_by_all(place: Place, stacks: dict[str, Tensor], shared: frozenset[str], held: int) -> frozenset[str]:
    """The tensors that are held once by every rank and are equal on all; others of them become stacks again."""
    own = {name: checksum([stacks[name]]) for name in shared}
    every = place.control.objects(own)
    common = {name for name, number in own.items() if all(found.get(name) == number for found in every)}
    for name in shared - common:
        one = stacks[name]
        stack = one.detach().expand(held, *one.shape).clone()
        stacks[name] = nn.Parameter(stack, one.requires_grad) if isinstance(one, nn.Parameter) else stack
    return frozenset(common)
