"""Counter-based member draws, in PyTorch integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draw_members(
    seed: int, offset: int, num_members: int, batch: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Draw one member per sample: ``floor(philox(seed, offset, i) * K / 2**32)`` for sample i.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key ``seed`` and
    counter ``(i, offset)``, 64 bits each; the first of its four outputs is used.

    Returns:
        int64 tensor [batch], each in ``[0, num_members)``.
    """
    index = torch.arange(batch, dtype=torch.int64, device=device)
    x0, x1 = index & _MASK, index >> 32
    x2 = torch.full_like(index, offset & _MASK)
    x3 = torch.full_like(index, (offset >> 32) & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((b >> 32) & _MASK) ^ x1 ^ k0, b & _MASK
        x2, x3 = ((a >> 32) & _MASK) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return (x0 * num_members) >> 32
