"""What a network remembers from call to call: caches that any call fills, or what a call of its own left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastens.engine.arguments import Arguments
from fastens.engine.objects import objects_kept
from fastens.engine.rows import drawn_like
from fastens.engine.structure import uncounted
from fastens.fold.tensor import tensors_of
from fastens.network.alike import first_difference
from fastens.network.barrier import unwatched
from fastens.network.member_tables import settle, view_of_member
from fastens.network.snapshots import thread_locals
from fastens.network.state import random_kept, state_kept

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


def remembers_calls(engine: Engine, arguments: Arguments, method: str = "forward") -> bool:
    """Whether what a member leaves behind in itself depends on its inputs, or on how often it was called.

    Two copies of a member are called on different numbers, and each again. Caches of what follows from weights and
    shapes are the same in both, and complete after the first call.
    """
    if not engine.kind.own_weights:  # one network for all members
        return True
    left = []
    with uncounted(), torch.no_grad(), random_kept(), objects_kept(arguments):
        for _ in range(2):
            try:
                found = _left_behind(engine, arguments, method)
            except Exception:  # it takes no other numbers, which shows nothing
                return True
            if found is None:
                return True
            left.append(found)
    (first, tensors), (other, others) = left
    return first_difference(first, other) is not None or any(
        tensors[name].shape != others[name].shape or not torch.equal(tensors[name], others[name]) for name in tensors
    )


def _left_behind(engine: Engine, arguments: Arguments, method: str) -> tuple[nn.Module, dict[str, Tensor]] | None:
    """A copy of the first member after a call on drawn numbers, and its tensors; none where another call changes it."""
    with state_kept(engine.network):
        view = unwatched(view_of_member(engine.network, 0)[0])
        engine.call_module(view, 0, drawn_like(arguments), method)
        settle(view, keeps=True, apart=True)
        with state_kept(engine.network) as tables, state_kept(view) as again:
            engine.call_module(view, 0, drawn_like(arguments), method)
        if tables or again or thread_locals(view):  # a cache of this thread is none of others
            return None
        return view, {name: tensor.clone() for name, tensor in tensors_of(view).items()}
