"""Which operations of torch give an element the same bits wherever it stands: what deterministic plans may call.

Copies, and arithmetic that IEEE 754 rounds once. Not sums and products of matrices, whose order of additions depends on
sizes and threads; nor exponentials and the like, which torch computes by one formula in whole vectors and by another
where an array ends.
"""

from __future__ import annotations

from fastens.plan.graph import TorchCall

_MOVES = (
    "clone copy copy_ _to_copy cat stack repeat index index_select gather embedding flip roll where masked_fill "
    "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d tril triu select_copy "
    "slice_scatter select_scatter contiguous expand_copy new_zeros zeros_like full_like upsample_nearest1d "
    "upsample_nearest2d eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not arange"
).split()
_ROUNDED_ONCE = "add sub mul div neg abs relu sqrt minimum maximum clamp floor ceil round trunc sign".split()
_NAMES = {f"aten.{name}" for name in (*_MOVES, *_ROUNDED_ONCE)} | {"fastens.embedding"}


def is_exact(call: TorchCall) -> bool:
    """Whether a call gives each element bits that depend on the operands' elements alone."""
    return str(call.func).rpartition(".")[0] in _NAMES and call.kwargs.get("alpha", 1) == 1
