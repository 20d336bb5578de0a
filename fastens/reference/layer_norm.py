"""Layer normalisation with each member's own scale and shift, naively."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._rows import affine


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise, then scale and shift. Shapes as in :func:`fastens.ops.layer_norm.layer_norm`."""
    y = F.layer_norm(x, list(normalized_shape), eps=eps)
    return affine(y, weight, bias, x.ndim - len(normalized_shape), offsets)
