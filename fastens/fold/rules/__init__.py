"""What torch functions do to member-valued tensors, by family; a function that is in none runs entry by entry."""

from fastens.fold.rules import (
    attention,
    convolution,
    elementwise,
    embedding,
    indexing,
    linear,
    metadata,
    norm,
    random,
    recurrent,
    reduction,
    rowwise,
    shape,
)

__all__ = [
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "indexing",
    "linear",
    "metadata",
    "norm",
    "random",
    "recurrent",
    "reduction",
    "rowwise",
    "shape",
]
