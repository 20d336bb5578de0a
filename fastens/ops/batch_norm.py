"""Batch normalisation in evaluation mode with each member's own statistics."""

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.reference import batch_norm as reference

_batch_norm = Op(
    "batch_norm(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05, Tensor? offsets=None) -> Tensor",
    reference.batch_norm,
)


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise by each member's running statistics, then scale and shift (arXiv 1502.03167, inference).

    Args:
        x: [R, C, ...], rows grouped by member.
        running_mean: [K, C].
        running_var: [K, C].
        weight: [K, C], or none.
        bias: [K, C], or none.
        eps: added to the variance.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, C, ...].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit.
    """
    num_members = running_mean.shape[0]
    check_rows("batch_norm", x, num_members, offsets)
    stacks = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, stack in stacks.items():
        check_stack("batch_norm", name, stack, (num_members, x.shape[1]))
    return _batch_norm.default(x, running_mean, running_var, weight, bias, eps, offsets)
