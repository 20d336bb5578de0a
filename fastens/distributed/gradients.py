"""Gradients through what ranks exchange: every rank computes the same loss of what all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastens.distributed.exchange import Exchange
from fastens.engine.eager import added


class _Gathered(torch.autograd.Function):
    """Parts of all ranks, joined; a rank's part of the gradient, which is the same on all, goes back to it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shapes: Any, exchange: Exchange) -> Tensor:
        """Join the parts in the order of the ranks."""
        ctx.start = sum(shape[0] for shape in shapes[: exchange.rank])
        ctx.stop = ctx.start + shapes[exchange.rank][0]
        return torch.cat(exchange.gather(own, shapes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Take this rank's part."""
        return grads[0][ctx.start : ctx.stop], None, None


class _Replicated(torch.autograd.Function):
    """A replicated value; its gradient is the sum over the ranks' members."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        """Return it."""
        ctx.exchange = exchange
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Add up in the order of the ranks."""
        return _Summed.apply(grads[0], ctx.exchange), None


class _Summed(torch.autograd.Function):
    """The sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        """Add up in the order of the ranks, in float32 at least."""
        ctx.exchange = exchange
        parts = exchange.gather(x.to(torch.promote_types(x.dtype, torch.float32)), [x.shape] * exchange.size)
        return added(parts).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of a sum that all ranks have is theirs."""
        return grads[0], None


class _Own(torch.autograd.Function):
    """Select this rank's members from replicated values [K, ...]; the gradient is gathered from all ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, held: slice, counts: Any, exchange: Exchange) -> Tensor:
        """Take them."""
        ctx.counts, ctx.exchange = counts, exchange
        return values[held].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Join what belongs to the members of each rank."""
        counts, exchange = ctx.counts, ctx.exchange
        own = grads[0][: counts[exchange.rank]]
        return gathered(own, [(count, *own.shape[1:]) for count in counts], exchange), None, None, None


class _DealtOver(torch.autograd.Function):
    """A replicated value, expanded to each local member; gradients are summed in the order of all K members."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: int, counts: Any, exchange: Exchange) -> tuple[Tensor, ...]:
        """Give it to each that is held."""
        ctx.counts, ctx.exchange = counts, exchange
        return tuple(x.view_as(x) for _ in range(held))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Add up, of all ranks' members."""
        counts, exchange = ctx.counts, ctx.exchange
        own = torch.stack(grads)[: counts[exchange.rank]]
        every = gathered(own, [(count, *grads[0].shape) for count in counts], exchange)
        return added(list(every)), None, None, None


def dealt(x: Tensor, held: int, counts: Sequence[int], exchange: Exchange) -> Sequence[Tensor]:
    """Expand a replicated argument to each local member; see :func:`fastens.engine.eager.replicated_by`."""
    return _DealtOver.apply(x, held, counts, exchange)


def own_values(values: Tensor, held: slice, counts: Sequence[int], exchange: Exchange) -> Tensor:
    """Select the local members' values from values [K, ...]; the gradient is that of all ranks."""
    return _Own.apply(values, held, counts, exchange) if values.requires_grad else values[held]


def gathered(own: Tensor, shapes: Sequence[Sequence[int]], exchange: Exchange) -> Tensor:
    """The parts of all ranks joined in dimension 0, where rank j has ``shapes[j]``."""
    return own if exchange.size == 1 else _Gathered.apply(own, [tuple(s) for s in shapes], exchange)


def replicated(x: Any, exchange: Exchange) -> Any:
    """An argument that all ranks have, whose gradient is the sum over their members."""
    wants = isinstance(x, Tensor) and x.requires_grad and exchange.size > 1
    return _Replicated.apply(x, exchange) if wants else x
