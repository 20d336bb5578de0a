"""Aggregation, then guidance and a linear update, naively."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens import rules
from fastens.reference.aggregate import aggregate
from fastens.reference.member_variance import member_variance


def aggregate_update(
    scores: Tensor | Sequence[Tensor],
    rule: str | rules.Rule = "mean",
    x: Tensor | None = None,
    noise: Tensor | None = None,
    coefficients: Tensor | None = None,
    guidance: Tensor | None = None,
    variance: bool = False,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``a x + b s + c noise`` with the aggregate s, and the variance or an empty tensor.

    Shapes as in :func:`fastens.ops.aggregate_update.aggregate_update`.
    """
    stack = scores if isinstance(scores, Tensor) else torch.stack(list(scores))  # [K, B, ...]
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    result = aggregate(wide, rule, seed=seed, offset=offset)

    def per_sample(values: Tensor) -> Tensor:
        return values.to(wide.dtype).reshape(-1, *(1,) * (result.ndim - 1))

    if guidance is not None:
        plain, conditional = result.chunk(2)
        result = plain + per_sample(guidance) * (conditional - plain)
    if coefficients is not None:
        result = per_sample(coefficients[1]) * result
        if x is not None:
            result = result + per_sample(coefficients[0]) * x
        if noise is not None:
            result = result + per_sample(coefficients[2]) * noise
    spread = member_variance(stack) if variance else stack.new_empty(0)
    return result.to(stack.dtype), spread
