"""Philox4x32-10 in PyTorch integer arithmetic (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""

from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix counters into random words.

    Args:
        counter: four int64 tensors of one shape (or that broadcast), each in [0, 2^32).
        key: 64 bits, or int64 [] that holds them.

    Returns:
        Four int64 tensors, each in [0, 2^32).
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((b >> 32) & _MASK) ^ x1 ^ k0, b & _MASK
        x2, x3 = ((a >> 32) & _MASK) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0, x1, x2, x3
