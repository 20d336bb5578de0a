"""The structure of what members return: leaves that are scores, and everything else."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def columns(outputs: list[Any]) -> list[Any]:
    """The leaves of several outputs side by side, and their structure last."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    return [*(list(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)), flat[0][1]]


def is_scores(x: Any) -> bool:
    """Whether a leaf [K, B, ...], or its K parts side by side, is what a rule combines."""
    first = x if isinstance(x, Tensor) else x[0]
    return isinstance(first, Tensor) and first.is_floating_point()


def agreed(column: Any) -> Any:
    """What all members return alike, where it is not scores.

    Raises:
        TypeError: they differ, or it is an object whose tensors are not known.
    """
    first = column[0]
    if isinstance(first, Tensor):
        if any(not torch.equal(first, other) for other in column[1:]):
            raise TypeError(f"members return different {first.dtype} tensors, which no rule combines")
    elif type(first).__module__ not in ("builtins", "torch"):
        raise TypeError(
            f"members return a {type(first).__name__}, whose tensors the ensemble does not know; "
            "register it with torch.utils._pytree.register_pytree_node, or return tensors, tuples or dicts"
        )
    return first


def stacked(scores: Any) -> Tensor:
    """One tensor [K, B, ...]."""
    return scores if isinstance(scores, Tensor) else torch.stack(scores)


def combined(combine: Callable[[Any], Tensor], scores: Any) -> Tensor:
    """Scores [K, B, ...] as one, or a number that each member returns, as of one sample."""
    if scores[0].ndim or combine is stacked:
        return combine(scores)
    return combine(stacked(scores)[:, None])[0]


def plain(output: Any) -> Any:
    """A diffusers output's tensor; anything else as it is."""
    to_tuple = getattr(output, "to_tuple", None)
    values = to_tuple() if to_tuple is not None else ()
    return values[0] if len(values) == 1 else output
