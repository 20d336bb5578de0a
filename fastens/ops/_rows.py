"""The checks that the member-batched ops share."""

import torch
from torch import Tensor


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


def check_stack(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless the parameter stack has the expected shape, member axis first."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected {list(shape)} (members first)")
