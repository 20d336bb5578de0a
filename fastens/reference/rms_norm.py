"""Root-mean-square normalisation with each member's own scale, naively."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._rows import affine


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise, then scale. Shapes as in :func:`fastens.ops.rms_norm.rms_norm`."""
    y = F.rms_norm(x, list(normalized_shape), eps=eps)
    return affine(y, weight, None, x.ndim - len(normalized_shape), offsets).to(x.dtype)
