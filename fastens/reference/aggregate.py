"""Every rule on a stack of scores, by its definition."""

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

    Raises:
        TypeError: the rule's definition returns no floating-point tensor.
        ValueError: it returns another shape, or the rule draws a member per trajectory.
    """
    stack = scores if isinstance(scores, Tensor) else torch.stack(list(scores))  # [K, B, ...]
    value = rules.Mean(tuple(weights)) if weights is not None else rules.get(rule)
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    return _combined(wide, value, seed, offset).to(stack.dtype)


def _combined(stack: Tensor, rule: rules.Rule, seed: int, offset: int) -> Tensor:
    if rule.per_trajectory:
        raise ValueError(f"`rule`: {rule!r} needs a trajectory; use an Ensemble")
    if rule.per_evaluation:
        batch = stack.shape[1]
        drawn = draw_members(seed, offset, len(stack), batch, device=stack.device)
        return stack[drawn, torch.arange(batch, device=stack.device)]
    out = rule.combine(stack)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        what = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"rule {rule!r} returns {what}, expected a floating-point tensor")
    if out.shape != stack.shape[1:]:
        raise ValueError(
            f"rule {rule!r} makes {list(out.shape)} of scores {list(stack.shape)}, expected {list(stack.shape[1:])}: "
            "the members' dimension, which is the first, is the one to reduce"
        )
    return out
