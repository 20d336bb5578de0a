"""Layer normalisation with each member's own scale and shift."""

from collections.abc import Sequence

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.reference import layer_norm as reference

_layer_norm = Op(
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    "Tensor? offsets=None) -> Tensor",
    reference.layer_norm,
)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise over the last dimensions, then scale and shift by the row's member (Ba et al., arXiv 1607.06450).

    Args:
        x: [R, ..., *normalized_shape], rows grouped by member.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: [K, *normalized_shape], or none.
        bias: [K, *normalized_shape], or none.
        eps: added to the variance.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, ..., *normalized_shape].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit.
    """
    for name, stack in (("weight", weight), ("bias", bias)):
        if stack is not None:
            check_rows("layer_norm", x, stack.shape[0], offsets)
            check_stack("layer_norm", name, stack, (stack.shape[0], *normalized_shape))
    return _layer_norm.default(x, normalized_shape, weight, bias, eps, offsets)
