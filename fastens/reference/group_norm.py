"""Group normalisation with each member's own scale and shift, naively."""

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._activation import activate
from fastens.reference._rows import affine, modulate
from fastens.reference.dropout import masked


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
) -> Tensor:
    """Normalise, scale and shift by member, then by row, and activate.

    Shapes as in :func:`fastens.ops.group_norm.group_norm`.
    """
    y = affine(F.group_norm(x, num_groups, eps=eps), weight, bias, 1, offsets)
    y = activate(modulate(y, scale, shift, 1), activation)
    return masked(y.to(x.dtype), members, samples, p, key, evaluation)
