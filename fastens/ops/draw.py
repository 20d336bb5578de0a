"""Random members from a counter."""

from torch import Tensor

from fastens.reference import draw as reference


def draw_members(seed: int, offset: int, num_members: int, batch: int) -> Tensor:
    """Draw one member per sample, the same on every device: sample i's depends on (seed, offset, i) only.

    Args:
        seed: the key of the counter-based generator, 64 bits.
        offset: which draw this is, e.g. the evaluation's number.
        num_members: K, 0 < K < 2^31.
        batch: B.

    Returns:
        int64 [B] on the CPU, each in [0, K); uniform up to a bias of K / 2^32.

    Raises:
        ValueError: K below one, or a negative batch.
    """
    if num_members < 1 or batch < 0:
        raise ValueError(f"draw_members: num_members {num_members} and batch {batch}, expected at least 1 and 0")
    return reference.draw_members(seed, offset, num_members, batch)
