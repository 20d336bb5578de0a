"""Members and their derivatives along a direction, from one planned pass: what a divergence is estimated from."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import reproducible
from fastens.engine.arguments import Arguments
from fastens.engine.calls import PlannedCall
from fastens.engine.engine import Engine
from fastens.engine.guards import modes
from fastens.engine.leaves import Leaves
from fastens.fold.sharing import sharing_noted
from fastens.fold.tensor import NotFoldable, all_members
from fastens.network.state import state_kept
from fastens.trace.jvp import along
from fastens.trace.record import NotRecordable, record


@torch.no_grad()
def outputs_and_jvp(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], tangent: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Evaluate all members, and their derivatives along a tangent of the batch, without a graph to go back through.

    Args:
        engine: of the members.
        args: positional arguments of a call.
        kwargs: keyword arguments.
        tangent: [B, ...], shaped as the batch.

    Returns:
        The members' first output and its derivative, each [K, B, ...]; none where no plan gives both (another device
        than the CPU, training mode, an operation whose derivative is not known): there, differentiate by autograd.
    """
    arguments = Arguments(args, kwargs, engine.num_members)
    key = modes(), ("along", arguments.plan_key(), tangent.stride())
    plannable = not engine.behaviour.looped and not torch.compiler.is_compiling() and engine.can_plan(arguments)
    if not plannable or reproducible.enabled() or engine.kind.fresh or arguments.own or engine.plans.refused(key):
        return None
    entry = engine.plans.current(key)
    if entry is None:
        with engine.turn():
            found = _made(engine, arguments, tangent, key)
    else:
        found = entry.leaves.whole(entry.run([*arguments.tensors, tangent], {}))
    return None if found is None else (found[0], found[1])


def _made(engine: Engine, arguments: Arguments, tangent: Tensor, key: Any) -> list[Any] | None:
    """Make the plan of a signature, and run it; none where there can be no plan."""
    engine.evaluate(arguments, engine.network.training)  # held against the members where it was not yet
    number = next(i for i, x in enumerate(arguments.tensors) if x is arguments.batch)
    rows = engine.num_members * arguments.batch_size
    if engine.behaviour.looped or not engine.cap.holds_recording(("along", arguments.signature()), 3 * rows):
        return None
    hidden, call = all_members(engine.num_members), arguments.described("derivative along a direction")
    whole, _, _ = PlannedCall(engine, arguments).passes(differentiated=True)

    def member(tensors: list[Tensor], exact: bool = False) -> list[Tensor] | None:
        """The first member's output, and its derivative seen along a fixed direction, by going backward."""
        if exact:
            return None
        with torch.enable_grad():
            inner = [x.detach() for x in tensors[:-1]]
            inner[number].requires_grad_()
            output = pytree.tree_leaves(engine.call_member(0, arguments.with_tensors(inner)))[0]
            (gradient,) = torch.autograd.grad(output, inner[number], _direction(output))
        return [output.detach(), _seen(gradient, tensors[-1])]

    def seen(leaves: list[Tensor]) -> list[Tensor]:
        return [leaves[0], _seen(leaves[1], _direction(leaves[1]))]

    try:
        with state_kept(engine.network), sharing_noted() as passes:
            recording, (_, leaves) = record(lambda: whole(arguments.tensors), arguments.tensors)
        engine.hold_sharing(passes, arguments)
    except (NotRecordable, NotFoldable, RuntimeError) as error:
        engine.plans.refuse(key, str(error), call)
        return None
    if leaves.kinds[:1] != ("rows",):
        return None
    both = Leaves(("rows", "rows"), (None, None), leaves.spec, leaves.size)

    def beside(tensors: list[Tensor]) -> tuple[list[Tensor], Leaves]:
        return list(along(recording, tensors[:-1], tensors[-1], number)), both

    dropouts = engine.kind.dropouts(hidden, arguments)
    return engine.plans.make(
        key, beside, member, [*arguments.tensors, tangent], call=call, seen=seen, dropouts=dropouts
    )


def _seen(moved: Tensor, direction: Tensor) -> Tensor:
    return (moved * direction).flatten(1).sum(1)


def _direction(like: Tensor) -> Tensor:
    """A direction in which a derivative is looked at: the same for every sample, along no axis."""
    wave = torch.arange(1, like[0].numel() + 1, dtype=like.dtype, device=like.device).cos()
    return wave.view(like.shape[1:]).expand(like.shape)
