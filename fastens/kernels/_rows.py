"""Which member each row of a folded batch belongs to, and whether Triton interprets kernels."""

import os

import torch
from torch import Tensor


def members_of_rows(offsets: Tensor | None, num_members: int, rows: int, device: torch.device) -> Tensor | None:
    """Return int32 [R], the member of each row; none for equal groups, where a kernel divides.

    Args:
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        num_members: K.
        rows: R.
        device: where the result goes.
    """
    if offsets is None:
        return None
    counts = offsets.to(device, non_blocking=True).diff()
    members = torch.arange(num_members, dtype=torch.int32, device=device)
    return torch.repeat_interleave(members, counts, output_size=rows)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
