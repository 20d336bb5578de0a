"""Embedding lookup in each member's own table, naively."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.reference._rows import expand_rows


def embedding(index: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Look ``index`` up in the table of its row's member. Shapes as in :func:`fastens.ops.embedding.embedding`."""
    num_members, num_embeddings, dim = weight.shape
    first = expand_rows(torch.arange(num_members, device=index.device) * num_embeddings, index.shape[0], offsets)
    shifted = index + first.reshape(-1, *(1,) * (index.ndim - 1))
    return F.embedding(shifted, weight.reshape(num_members * num_embeddings, dim))
