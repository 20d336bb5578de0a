"""Counter-based member draws, in PyTorch integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from fastens.reference._philox import philox

_MASK = 0xFFFFFFFF


def draw_members(
    seed: int, offset: int, num_members: int, batch: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Draw one member per sample: ``floor(philox(seed, offset, i) * K / 2**32)`` for sample i.

    Philox4x32-10 with key ``seed`` and counter ``(i, offset)``, 64 bits each; the first of its four outputs is used.

    Returns:
        int64 tensor [batch], each in ``[0, num_members)``.
    """
    return members_of(seed, offset, num_members, torch.arange(batch, dtype=torch.int64, device=device))


def members_of(seed: int, offset: int, num_members: int, index: Tensor) -> Tensor:
    """The same for samples of these numbers, int64 [B], none negative."""
    low, high = torch.full_like(index, offset & _MASK), torch.full_like(index, (offset >> 32) & _MASK)
    words = philox((index & _MASK, index >> 32, low, high), seed)
    return (words[0] * num_members) >> 32
