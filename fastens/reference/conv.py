"""Member-batched convolution, naively."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.reference._rows import per_member


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    offsets: Tensor | None = None,
) -> Tensor:
    """One library convolution per member, joined. Shapes as in :func:`fastens.ops.conv.conv`."""
    weights = weight.unbind()
    biases = [None] * len(weights) if bias is None else bias.unbind()

    def member(rows: Tensor, k: int) -> Tensor:
        return torch.convolution(
            rows, weights[k], biases[k], stride, padding, dilation, transposed, output_padding, groups
        )

    return per_member(member, x, weight.shape[0], offsets)
