"""Members and their derivatives along a direction, from one planned pass: what a divergence is estimated from."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.arguments import Arguments
from fastens.fold.engine import FoldEngine
from fastens.plan.record import NotRecordable, record
from fastens.plan.tangents import along


@torch.no_grad()
def outputs_along(
    engine: FoldEngine, args: tuple[Any, ...], kwargs: dict[str, Any], tangent: Tensor
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
    arguments = Arguments(args, kwargs)
    key = ("along", *arguments.plan_key(), tangent.stride())
    rows = engine.num_members * arguments.batch_size
    plannable = engine.engine == "fold" and not torch.compiler.is_compiling() and engine._can_plan(arguments, rows)
    if not plannable or engine.plans.refused(key):
        return None
    found = engine.plans.run(key, [*arguments.tensors, tangent])
    if found is None:
        found = _made(engine, arguments, tangent, key)
    if found is None:
        return None
    value, moved = (engine._unfolded(leaf, arguments.batch_size) for leaf in found[0])
    return value, moved


def _made(engine: FoldEngine, arguments: Arguments, tangent: Tensor, key: Any) -> tuple[list[Tensor], Any] | None:
    """Make the plan of a signature, and run it; none where there can be no plan."""
    arguments = arguments.excluding(engine._established(arguments, engine.network.training)[0])
    number = next(i for i, x in enumerate(arguments.tensors) if x is arguments.batch)
    rows = engine.num_members * arguments.batch_size
    held = engine.cap.holds_recording(engine._key(arguments, engine.network.training), 3 * rows)
    if engine.engine == "loop" or not held:
        return None

    def whole(tensors: list[Tensor]) -> Any:
        return engine._pass(arguments.with_tensors(tensors), None, None)

    def member(tensors: list[Tensor]) -> Any:
        """The first member's output, and its derivative seen along a fixed direction, by going backward."""
        with torch.enable_grad():
            inner = [x.detach() for x in tensors[:-1]]
            inner[number].requires_grad_()
            output = pytree.tree_leaves(engine._call(0, *arguments.with_tensors(inner).of_member(0)))[0]
            (gradient,) = torch.autograd.grad(output, inner[number], _direction(output))
        return output.detach(), _seen(gradient, tensors[-1])

    def seen(leaves: list[Tensor]) -> list[Tensor]:
        return [leaves[0], _seen(leaves[1], _direction(leaves[1]))]

    try:
        recording, _ = record(lambda: whole(arguments.tensors), arguments.tensors)
    except (NotRecordable, RuntimeError) as error:
        engine.plans.refuse(key, str(error))
        return None

    def beside(tensors: list[Tensor]) -> Any:
        return along(recording, tensors[:-1], tensors[-1], number)

    return engine.plans.make(key, beside, member, [*arguments.tensors, tangent], seen=seen)


def _seen(moved: Tensor, direction: Tensor) -> Tensor:
    return (moved * direction).flatten(1).sum(1)


def _direction(like: Tensor) -> Tensor:
    """A direction in which a derivative is looked at: the same for every sample, along no axis."""
    wave = torch.arange(1, like[0].numel() + 1, dtype=like.dtype, device=like.device).cos()
    return wave.view(like.shape[1:]).expand(like.shape)
