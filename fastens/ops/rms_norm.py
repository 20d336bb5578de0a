"""Root-mean-square normalisation with each member's own scale."""

from collections.abc import Sequence

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.reference import rms_norm as reference

_rms_norm = Op(
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, "
    "Tensor? offsets=None) -> Tensor",
    reference.rms_norm,
)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Divide by the root mean square of the last dimensions, then scale by the row's member (arXiv 1910.07467).

    Args:
        x: [R, ..., *normalized_shape], rows grouped by member.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: [K, *normalized_shape], or none.
        eps: added to the mean square; none for the machine epsilon of the dtype, as in torch.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, ..., *normalized_shape].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit.
    """
    if weight is not None:
        check_rows("rms_norm", x, weight.shape[0], offsets)
        check_stack("rms_norm", "weight", weight, (weight.shape[0], *normalized_shape))
    return _rms_norm.default(x, normalized_shape, weight, eps, offsets)
