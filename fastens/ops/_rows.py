"""The checks that the member-batched ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")


def check_rows(op: str, x: Tensor, num_members: int, offsets: Tensor | None) -> None:
    """Raise unless the rows of ``x`` [R, ...] can be dealt out to the members."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x is 0-dimensional, expected rows of the folded batch in dimension 0")
    if offsets is None:
        if x.shape[0] % num_members:
            raise ValueError(
                f"{op}: x has {x.shape[0]} rows, expected a multiple of the {num_members} members; "
                "pass offsets for groups of unequal size"
            )
    elif offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] != num_members + 1:
        raise ValueError(
            f"{op}: offsets is {offsets.dtype} {list(offsets.shape)}, "
            f"expected int64 [{num_members + 1}] with the first row of each member and the number of rows"
        )


def check_stack(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], axis: str = "members first") -> None:
    """Raise unless the stack of one entry per member, or per row, has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected {list(shape)} ({axis})")


def check_activation(op: str, activation: str, known: Sequence[str]) -> None:
    """Raise unless the op knows the activation."""
    if activation not in known:
        raise ValueError(f"{op}: activation {activation!r} is unknown, expected one of {', '.join(map(repr, known))}")


def check_masks(op: str, x: Tensor, p: float, members: Tensor | None, samples: Tensor | None) -> None:
    """Raise unless rows of ``x`` [R, ...] can be masked: p is a probability, and each row has a member."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p is {p}, expected a probability")
    if p and members is None:
        raise ValueError(f"{op}: p is {p} and members is None, expected the member of each row")
    for name, numbers in (("members", members), ("samples", samples)):
        if numbers is None:
            continue
        if x.ndim == 0 or numbers.shape != x.shape[:1] or numbers.dtype != torch.int64:
            raise ValueError(
                f"{op}: {name} is {numbers.dtype} {list(numbers.shape)}, expected int64, one number for each row "
                f"of x {list(x.shape)}"
            )


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous, with channels after the rows or last."""
    return x.is_contiguous() or (x.ndim > 1 and x.movedim(1, -1).is_contiguous())
