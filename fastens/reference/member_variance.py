"""Member variance, as the formula reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def member_variance(scores: Tensor | Sequence[Tensor]) -> Tensor:
    """Return ``1/K sum_k (S_k - mean)**2``, in at least float32, cast back.

    Args:
        scores: [K, B, ...], or K tensors [B, ...].

    Returns:
        [B, ...], dtype of the scores.
    """
    stack = scores if isinstance(scores, Tensor) else torch.stack(list(scores))  # [K, B, ...]
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    return (wide - wide.mean(0)).square().mean(0).to(stack.dtype)
