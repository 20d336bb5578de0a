"""Embedding lookup in each member's own table."""

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows
from fastens.reference import embedding as reference

_embedding = Op("embedding(Tensor index, Tensor weight, Tensor? offsets=None) -> Tensor", reference.embedding)


def embedding(index: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Look each row's indices up in its member's table: ``y[r] = weight[k, index[r]]``.

    Args:
        index: integer [R, ...], rows grouped by member.
        weight: [K, num_embeddings, dim].
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, ..., dim].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or a table without member axis.
        IndexError: an index outside the table (checked on the CPU; on a GPU it is undefined, as in torch).
    """
    if weight.ndim != 3:
        raise ValueError(f"embedding: weight is {list(weight.shape)}, expected [members, num_embeddings, dim]")
    check_rows("embedding", index, weight.shape[0], offsets)
    return _embedding.default(index, weight, offsets)
