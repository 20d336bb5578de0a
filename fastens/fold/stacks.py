"""How a torch function's arguments reach a member-batched op."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastens.fold.member_tensor import MemberTensor
from fastens.fold.rows import Rows


def stack_of(value: Any, like: MemberTensor) -> Tensor | None:
    """The stack [K, ...] of a parameter that may be absent, or the same for all members."""
    if value is None:
        return None
    if isinstance(value, MemberTensor):
        return value.stack
    return value.expand(like.stack.shape[0], *value.shape)


def call_op(op: Callable[[Tensor, Tensor | None], Tensor], x: Any, rows: Rows) -> Any:
    """Call ``op(x, offsets)`` on the rows of the batch, or once per member on an input without batch."""
    if isinstance(x, MemberTensor):
        return MemberTensor(op(x.stack, None), rows)
    if rows.carries_batch(x):
        return op(x, rows.scaled_offsets(x.shape[0]))
    return MemberTensor(op(x.expand(rows.num_members, *x.shape), None), rows)
