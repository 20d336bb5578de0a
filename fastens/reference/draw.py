"""Member draws from a counter: Philox4x32-10 (Salmon et al., SC 2011) in 64-bit integer tensors."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(seed: int, offset: int, index: Tensor) -> Tensor:
    """First 32 random bits of counter (index, offset) under key ``seed``, int64 in [0, 2^32), shaped as ``index``."""
    x0, x1 = index & _MASK, (index >> 32) & _MASK
    x2 = torch.full_like(index, offset & _MASK)
    x3 = torch.full_like(index, (offset >> 32) & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2  # products wrap around, their 64 bits stay right
        x0, x1, x2, x3 = ((b >> 32) & _MASK) ^ x1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0


def draw_members(seed: int, offset: int, num_members: int, batch: int) -> Tensor:
    """One member per sample, int64 [batch]; as :func:`fastens.ops.draw.draw_members`."""
    return (philox(seed, offset, torch.arange(batch)) * num_members) >> 32
