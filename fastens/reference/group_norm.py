"""Group normalisation with each member's own scale and shift, naively."""

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._rows import affine


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise, then scale and shift. Shapes as in :func:`fastens.ops.group_norm.group_norm`."""
    return affine(F.group_norm(x, num_groups, eps=eps), weight, bias, 1, offsets)
