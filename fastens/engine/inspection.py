"""What an engine tells of itself: how far it is from the loop, and what each layer got."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastens.engine.arguments import Arguments
from fastens.engine.check import relative_error
from fastens.network.folded import layer_reports
from fastens.ops.run_program import target
from fastens.report import Report

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


def verify(engine: Engine, arguments: Arguments) -> float:
    """The largest relative error of a pass of all members against the loop."""
    with torch.no_grad(), engine.turn():
        *folded, _ = (
            engine.fold(arguments) if engine.behaviour.looped else engine.evaluate(arguments, engine.network.training)
        )
        *looped, _ = engine.loop(arguments)
    pairs = [(a, b) for a, b in zip(folded, looped, strict=True) if isinstance(b[0], Tensor)]
    return max((relative_error(a[k], x) for a, b in pairs for k, x in enumerate(b)), default=0.0)


def report(engine: Engine) -> Report:
    """Return what each module that owns tensors got, the plans, and the state of each signature."""
    plans, loops = engine.plans, engine.behaviour.looped
    layers = layer_reports(engine.network, engine.num_members, engine.ways, engine.behaviour.why if loops else None)
    why_not = "the members are called one by one" if loops else plans.why_not
    where = "" if plans.launched else target()  # launches run on no instruction set of the CPU
    found = (layers, plans.kinds, why_not, plans.num_bytes)
    return Report(
        engine.behaviour.engine,
        engine.num_members,
        engine.behaviour.why,
        *found,
        where,
        *plans.launches,
        slices=engine.slices,
        calls=[] if loops else list(engine.states.reports()),
    )
