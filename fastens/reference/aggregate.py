"""Aggregation of member outputs, naively: the definition of every rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.reference.draw import draw_members


def aggregate(
    scores: Sequence[Tensor], rule: str, weights: Sequence[float], option: str, eps: float, seed: int, offset: int
) -> Tensor:
    """Combine K tensors [B, ...] by a rule; parameters as in :func:`fastens.ops.aggregate.aggregate`."""
    dtype = scores[0].dtype
    if rule == "alternating":
        stack = torch.stack(tuple(scores))
        member = draw_members(seed, offset, len(scores), stack.shape[1]).to(stack.device)
        return stack[member, torch.arange(stack.shape[1], device=stack.device)]
    stack = torch.stack(tuple(scores)).to(torch.promote_types(dtype, torch.float32))  # [K, B, ...]
    if rule == "mean":
        combined = torch.tensordot(stack.new_tensor(weights), stack, 1) if weights else stack.mean(0)
    elif rule == "sum":
        combined = stack.sum(0)
    elif rule == "median":
        combined = _median(stack, option)
    elif rule == "geometric":
        combined = _geometric(stack, option, eps)
    elif rule == "dominant":
        combined = stack.gather(0, stack.abs().argmax(0, keepdim=True)).squeeze(0)
    elif rule == "max_abs":
        combined = stack.abs().amax(0)
    else:
        raise ValueError(f"aggregate: rule {rule!r} has no kernel")
    return combined.to(dtype)


def _median(stack: Tensor, even: str) -> Tensor:
    ordered = stack.sort(0).values
    k = len(stack)
    middle = ordered[(k - 1) // 2]
    if k % 2 == 0 and even == "average":
        middle = (middle + ordered[k // 2]) / 2
    # Sorting puts NaN last, where the middle does not see it.
    return torch.where(stack.isnan().any(0), torch.nan, middle)


def _geometric(stack: Tensor, shift: str, eps: float) -> Tensor:
    if stack.numel() == 0:
        return stack.sum(0)
    dims = [d for d in range(stack.ndim) if d != 1 or shift == "batch"]
    lowest = stack.amin(dims, keepdim=True)
    # S + |min S| + eps, with S - min S formed first for a negative minimum, or float32 loses eps.
    shifted = (stack + lowest.abs()) + eps
    mean = shifted.log().mean(0, keepdim=True).exp()
    return ((mean - eps) - lowest.abs()).squeeze(0)
