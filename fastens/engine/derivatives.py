"""Whether hand-written ``autograd.Function``s of a network differentiate in a fold as they do in the members.

Torch's own derivatives are those of the operations that the fold does. A Function's backward is code of the network
instead, which may read values, or call torch's engine on the tensors that it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastens.engine.arguments import Arguments
from fastens.engine.check import HALVES, relative_error, tolerance_for
from fastens.engine.memory_cap import is_out_of_memory
from fastens.engine.predictable import PredictableDraws
from fastens.engine.structure import uncounted
from fastens.fold.tensor import NotFoldable
from fastens.network.state import random_kept, state_kept
from fastens.network.tables import converted, seen_as

if TYPE_CHECKING:
    from fastens.engine.folding import FoldedMembers

_SUMMED = 10  # gradients are sums over rows and places, with more rounding errors in them than outputs
_CANCELLED = 1e-2  # of the largest gradient: what is smaller may be what is left of sums that cancel out


class Disturbed(NotFoldable):
    """Somebody wrote to weights while fold and members were held against each other: only this call is looped."""


def check_gradients(
    engine: FoldedMembers,
    arguments: Arguments,
    members: Callable[[Arguments], list[Tensor]],
    fold: Callable[[Arguments], list[Tensor]],
) -> None:
    """Hold the gradients that a fold gives against the members', in float32 where the network takes it.

    Args:
        engine: whose call it is.
        arguments: of the call.
        members: the outputs of the members one by one.
        fold: the same outputs of a fold, in the same order.

    Raises:
        NotFoldable: they part, or the fold gives none where members do.
    """
    half = any(x.dtype in HALVES for x in (*engine.tensors, *arguments.tensors))
    for wide in (True, False) if half else (False,):
        theirs, ours = (_Side(engine, arguments, wide) for _ in range(2))
        try:
            theirs.run(members)
        except Exception as error:  # it casts itself, or is not differentiated in such a way
            if is_out_of_memory(error):
                raise
            continue
        try:
            ours.run(fold)
        except Exception as error:  # the members have no such error
            if is_out_of_memory(error):
                raise
            raise NotFoldable(f"it is not differentiated where they are: {type(error).__name__}: {error}") from error
        return ours.hold(theirs)


class _Side:
    """Fold or members, on leaves of their own: no gradient of the user's is changed, no hook is called."""

    def __init__(self, engine: FoldedMembers, arguments: Arguments, wide: bool) -> None:
        self._engine, self._wide = engine, wide
        self._leaves: dict[int, Tensor] = {}
        self._inputs = [self._leaf(x) for x in arguments.tensors]
        self._arguments = arguments.with_tensors(self._inputs)
        self._device = next((x.device.type for x in arguments.tensors), "cpu")

    def _leaf(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self._wide and x.dtype in HALVES else x.dtype
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    def _seen(self, stack: Tensor) -> Tensor:
        """What the network reads in the place of a stack."""
        if not isinstance(stack, torch.nn.Parameter):
            return converted(stack, torch.float32) if self._wide and stack.dtype in HALVES else stack
        if id(stack) not in self._leaves:
            with torch._C.DisableTorchFunction():
                self._leaves[id(stack)] = torch.nn.Parameter(self._leaf(stack), stack.requires_grad)
        return self._leaves[id(stack)]

    def run(self, forward: Callable[[Arguments], list[Tensor]]) -> None:
        """Run forward and backward, in which fold and members draw alike, and undo what they leave behind."""
        autocast, engine = torch.is_autocast_enabled(self._device) and not self._wide, self._engine
        with ExitStack() as kept:
            for scope in (
                random_kept(),
                uncounted(),
                PredictableDraws(),
                *map(state_kept, (engine.network, *engine.views)),
            ):
                kept.enter_context(scope)
            kept.enter_context(seen_as(self._seen, kept=True))
            with torch.autocast(self._device, enabled=autocast):
                outputs = forward(self._arguments.copied())
            pairs = [(x, _direction(x, i)) for i, x in enumerate(outputs) if x.requires_grad]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [seed for _, seed in pairs])

    def gradients(self) -> dict[Any, Tensor]:
        """By what has them."""
        found = [*self._leaves.items(), *((-1 - i, x) for i, x in enumerate(self._inputs))]
        return {key: x.grad.to_dense() if x.grad.is_sparse else x.grad for key, x in found if x.grad is not None}

    def hold(self, theirs: _Side) -> None:
        """Raise where gradients part by more than rounding."""
        own, expected = self.gradients(), theirs.gradients()
        largest = max((float(x.abs().max()) for x in expected.values() if x.numel()), default=0.0)
        if not math.isfinite(largest):
            return
        for key in own.keys() | expected.keys():
            e = expected[key] if key in expected else torch.zeros_like(own[key])
            a = own[key] if key in own else torch.zeros_like(e)
            size = float(e.abs().max()) if e.numel() else 0.0
            error = relative_error(a, e) * (size or 1.0)
            if not error <= _SUMMED * tolerance_for(e, self._leaves.values()) * max(size, _CANCELLED * largest):
                raise NotFoldable(f"its gradients are {error / (size or largest or 1.0):.1e} from the members'")


def _direction(x: Tensor, i: int) -> Tensor:
    """In which output i is differentiated."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(x)
