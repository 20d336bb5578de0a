"""Folded embeddings, and ``F.embedding`` with a member's own table."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastens.fold.member_tensor import MemberTensor, folds
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.fold.rows import NotFoldable
from fastens.fold.stacks import call_op
from fastens.ops.embedding import embedding


class FoldedEmbedding(FoldedLayer):
    """Embedding tables of all members: one lookup in the joined table."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Look up ``x``, integers [R, ...] -> [R, ..., dim]."""
        if self.max_norm is not None:
            raise NotFoldable("max_norm rewrites the table at every lookup")
        return embedding(x, self.stack("weight"), offsets)


register_layer(nn.Embedding, FoldedEmbedding)


@folds(F.embedding)
def folded_embedding(input: Any, weight: Any, padding_idx: int | None = None, max_norm: Any = None, *_: Any) -> Any:
    """``F.embedding`` where the table is a parameter of each member."""
    if not isinstance(weight, MemberTensor) or max_norm is not None:
        return NotImplemented
    return call_op(lambda x, offsets: embedding(x, weight.stack, offsets), input, weight.rows)
