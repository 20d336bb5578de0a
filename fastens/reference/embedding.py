"""Embedding lookup in each member's own table, naively."""

import torch.nn.functional as F
from torch import Tensor

from fastens.reference._rows import per_member


def embedding(index: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Look ``index`` up in the table of its row's member. Shapes as in :func:`fastens.ops.embedding.embedding`.

    One lookup per member: a stray index is out of its table's range, never in another member's table.
    """
    return per_member(lambda rows, k: F.embedding(rows, weight[k]), index, weight.shape[0], offsets)
