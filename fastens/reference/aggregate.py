"""Every rule on a stack of scores, as the formulas of arXiv 2601.11444 read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens import rules
from fastens.reference.draw_members import draw_members


def aggregate(
    scores: Tensor | Sequence[Tensor],
    rule: str | rules.Rule = "mean",
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """Combine K scores by a rule, in at least float32, cast back.

    Args:
        scores: [K, B, ...], or K tensors [B, ...].
        rule: name, alias or value.
        weights: K numbers that sum to 1, for the mean.
        seed: of the member draw of "alternating".
        offset: of the member draw of "alternating".

    Returns:
        [B, ...], dtype of the scores.
    """
    stack = scores if isinstance(scores, Tensor) else torch.stack(list(scores))  # [K, B, ...]
    value = rules.Mean(tuple(weights)) if weights is not None else rules.get(rule)
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    return _combine(wide, value, seed, offset).to(stack.dtype)


def _combine(stack: Tensor, rule: rules.Rule, seed: int, offset: int) -> Tensor:
    num_members, batch = stack.shape[:2]
    if isinstance(rule, rules.Mean):
        if rule.weights is None:
            return stack.mean(0)
        weights = torch.tensor(rule.weights, dtype=stack.dtype, device=stack.device)
        return (stack * weights.view(-1, *[1] * (stack.dim() - 1))).sum(0)
    if isinstance(rule, rules.Sum):
        return stack.sum(0)
    if isinstance(rule, rules.Median):
        ordered = stack.sort(0).values
        lower, upper = ordered[(num_members - 1) // 2], ordered[num_members // 2]
        middle = lower if rule.even == "lower" or num_members % 2 else 0.5 * lower + 0.5 * upper
        return torch.where(stack.isnan().any(0), torch.nan, middle)
    if isinstance(rule, rules.Geometric):
        return _geometric(stack, rule)
    if isinstance(rule, rules.Dominant):
        return stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]
    if isinstance(rule, rules.MaxAbs):
        return stack.abs().amax(0)
    if isinstance(rule, rules.Alternating):
        drawn = draw_members(seed, offset, num_members, batch, device=stack.device)
        return stack[drawn, torch.arange(batch, device=stack.device)]
    raise ValueError(f"`rule`: {rule!r} needs a trajectory; use an Ensemble")


def _geometric(stack: Tensor, rule: rules.Geometric) -> Tensor:
    if stack.numel() == 0:
        return stack.sum(0)
    dims = [0, *range(2, stack.dim())] if rule.shift == "sample" else None
    smallest = stack.amin(dims, keepdim=True) if dims else stack.min()  # [1, B, 1, ...] or []
    # For min <= 0, m = -min + eps. Adding m to S would lose eps to rounding, so the difference is taken first.
    shift = smallest.abs() - torch.where(smallest > 0, 0.0, smallest.abs())
    base = torch.where(smallest > 0, 0.0, smallest)
    mean = (((stack - base) + shift) + rule.eps).log().mean(0).exp()
    return (mean - rule.eps) + (base - shift).squeeze(0)
