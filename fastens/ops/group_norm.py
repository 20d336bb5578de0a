"""Group normalisation with each member's own scale and shift."""

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.reference import group_norm as reference

_group_norm = Op(
    "group_norm(Tensor x, SymInt num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    "Tensor? offsets=None) -> Tensor",
    reference.group_norm,
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
) -> Tensor:
    """Normalise each row over groups of channels, then scale and shift by its member (Wu and He, arXiv 1803.08494).

    Args:
        x: [R, C, *space], rows grouped by member.
        num_groups: how many groups the C channels form.
        weight: [K, C], or none.
        bias: [K, C], or none.
        eps: added to the variance.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, C, *space].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit.
    """
    for name, stack in (("weight", weight), ("bias", bias)):
        if stack is not None:
            check_rows("group_norm", x, stack.shape[0], offsets)
            check_stack("group_norm", name, stack, (stack.shape[0], x.shape[1]))
    return _group_norm.default(x, num_groups, weight, bias, eps, offsets)
