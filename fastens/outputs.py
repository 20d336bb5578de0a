"""The structure of what members return: leaves that are scores, and everything else."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.engine.leaves import alike, columns_of


def columns(outputs: list[Any]) -> list[Any]:
    """The leaves of several outputs side by side, and their structure last."""
    return columns_of([pytree.tree_flatten(output) for output in outputs])


def is_scores(x: Any) -> bool:
    """Whether a leaf [K, B, ...], or its K parts side by side, is what a rule combines."""
    first = x if isinstance(x, Tensor) else x[0]
    return isinstance(first, Tensor) and first.is_floating_point()


def agreed(column: Any) -> Any:
    """Return the value on which all members agree, of an output that is no score.

    Raises:
        TypeError: they differ, or it is an object that may hold tensors of a member.
    """
    first = column[0]
    if isinstance(first, Tensor):
        if any(not torch.equal(first, other) for other in column[1:]):
            raise TypeError(
                f"members return different {first.dtype} tensors, which no rule combines; "
                "member_outputs(...) stacks them"
            )
        return first.clone()  # which a member may keep
    return alike(column)


def as_stack(scores: Any) -> Tensor:
    """One tensor [K, B, ...]."""
    return scores if isinstance(scores, Tensor) else torch.stack(scores)


def stacked(scores: Any) -> Tensor:
    """One tensor [K, B, ...] in memory of its own: a member may return a weight, an argument, or what it keeps."""
    return scores.clone() if isinstance(scores, Tensor) else torch.stack(scores)


def enters(column: Any, combine: Callable[[Any], Tensor]) -> bool:
    """Whether a leaf is combined: scores are, and without a rule every tensor is stacked."""
    return is_scores(column) or (combine is stacked and isinstance(column[0], Tensor))


def combined(combine: Callable[[Any], Tensor], scores: Any) -> Tensor:
    """Scores [K, B, ...] as one, or a number that each member returns, as of one sample.

    Raises:
        TypeError: they are nested tensors.
    """
    if scores[0].is_nested:
        raise TypeError(
            "members return nested tensors, which no rule combines: let them return torch.nested.to_padded_tensor(...)"
        )
    if scores[0].ndim or combine is stacked:
        return combine(scores)
    return combine(as_stack(scores)[:, None])[0]


def plain(output: Any) -> Any:
    """A diffusers output's tensor; anything else as it is."""
    to_tuple = getattr(output, "to_tuple", None)
    values = to_tuple() if to_tuple is not None else ()
    return values[0] if len(values) == 1 else output
