"""Lookups in tables."""

from typing import Any

import torch
import torch.nn.functional as F

from fastens.fold.dispatch import Fold, rule
from fastens.fold.nested import plain
from fastens.fold.tensor import member_valued
from fastens.ops.embedding import embedding


@rule(F.embedding)
def lookup(fold: Fold, func: Any, input: Any, weight: Any, padding_idx: int | None = None, max_norm: Any = None,
           norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False) -> Any:  # fmt: skip
    """Rows of a table; what its options do to gradients or to the table is done entry by entry."""
    if max_norm is not None or sparse:
        return NotImplemented
    if torch.is_grad_enabled() and weight.requires_grad and (padding_idx is not None or scale_grad_by_freq):
        return NotImplemented
    if not member_valued(weight):
        return fold.wrap(F.embedding(fold.stack(input), plain(weight)))
    if input.ndim == 0:
        return fold.wrap(embedding(fold.entries(input), fold.entries(weight)))
    if not member_valued(input) and fold.hidden.whole and not fold.recording:
        return fold.wrap(fold.stack(weight).index_select(1, plain(input).flatten()).unflatten(1, input.shape))
    (weights,), dealt = fold.parameters(weight)
    offsets = fold.hidden.scaled_offsets(input.shape[0]) if dealt else None
    return fold.unrows(embedding(fold.rows(input), weights, offsets))
