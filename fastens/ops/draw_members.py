"""Random members from a counter."""

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._scores import seed_from
from fastens.reference import draw_members as reference

_draw = Op(
    "draw_members(int seed, int offset, int num_members, SymInt batch) -> Tensor",
    reference.draw_members,
    {"native": lambda seed, offset, num_members, batch: torch.empty(batch, dtype=torch.int64)},
)


def draw_members(seed: int, offset: int, num_members: int, batch: int, *, backend: str = "auto") -> Tensor:
    """Draw one member per sample, the same on every device: sample i's depends on (seed, offset, i) only.

    Args:
        seed: the key of the counter-based generator, 64 bits.
        offset: which draw this is, e.g. the evaluation's number.
        num_members: K, 0 < K < 2^31.
        batch: B.
        backend: the code that runs it.

    Returns:
        int64 [B] on the CPU, each in [0, K); uniform up to a bias of K / 2^32.

    Raises:
        ValueError: K out of range, a negative batch, or a seed of more than 64 bits.
    """
    if not 0 < num_members < 2**31 or batch < 0:
        raise ValueError(
            f"draw_members: num_members is {num_members} and batch {batch}, expected 1 to 2**31 - 1 members and at "
            "least 0 samples"
        )
    return _draw.resolve(backend, ())(seed_from(seed), offset, num_members, batch)
