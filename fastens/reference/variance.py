"""Variance over members, naively."""

from collections.abc import Sequence

import torch
from torch import Tensor


def variance(scores: Sequence[Tensor]) -> Tensor:
    """Σ_k (S_k - mean)² / K of K tensors [B, ...]."""
    stack = torch.stack(tuple(scores))
    return stack.to(torch.promote_types(stack.dtype, torch.float32)).var(0, correction=0).to(stack.dtype)
