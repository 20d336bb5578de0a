"""Batch normalisation in evaluation mode with each member's own statistics, naively."""

import torch
from torch import Tensor

from fastens.reference._rows import affine


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """One scale and one shift per member and channel. Shapes as in :func:`fastens.ops.batch_norm.batch_norm`."""
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    centred = affine(x, None, -running_mean, 1, offsets)
    return affine(centred, scale.to(centred.dtype), bias, 1, offsets).to(x.dtype)
