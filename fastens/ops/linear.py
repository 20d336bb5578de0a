"""Member-batched linear layer."""

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.reference import linear as reference

_linear = Op("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? offsets=None) -> Tensor", reference.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Apply each member's linear layer to its own rows: ``y[r] = x[r] @ weight[k].T + bias[k]``.

    Args:
        x: [R, ..., in], rows grouped by member.
        weight: [K, out, in].
        bias: [K, out], or none.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.

    Returns:
        [R, ..., out].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit.
    """
    if weight.ndim != 3:
        raise ValueError(f"linear: weight is {list(weight.shape)}, expected [members, out, in]")
    check_rows("linear", x, weight.shape[0], offsets)
    if x.shape[-1] != weight.shape[2]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, weight expects {weight.shape[2]}")
    check_stack("linear", "bias", bias, (weight.shape[0], weight.shape[1]))
    return _linear.default(x, weight, bias, offsets)
