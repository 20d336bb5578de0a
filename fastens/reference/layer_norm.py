"""Layer normalisation with each member's own scale and shift, naively."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._activation import activate
from fastens.reference._rows import affine, modulate
from fastens.reference.dropout import masked


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
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

    Shapes as in :func:`fastens.ops.layer_norm.layer_norm`.
    """
    y = F.layer_norm(x, list(normalized_shape), eps=eps)
    axis = x.ndim - len(normalized_shape)
    y = activate(modulate(affine(y, weight, bias, axis, offsets), scale, shift, axis), activation)
    return masked(y.to(x.dtype), members, samples, p, key, evaluation)
