"""Member-batched convolution whose results are summed over the members, naively."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.reference.conv2d import conv2d


def conv2d_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    member_weights: Sequence[float],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Convolve each member's rows and combine them. Shapes as in :func:`fastens.ops.conv2d_sum.conv2d_sum`."""
    y, _ = conv2d(
        x, weight, bias, stride, padding, None, moments, norm_weight, norm_bias, eps, scale, shift, activation
    )
    by_member = y.unflatten(0, (weight.shape[0], -1))  # [K, B, O, H', W']
    weighted = [m * scores for m, scores in zip(member_weights, by_member, strict=True) if m]  # the others are not used
    return torch.stack(weighted).sum(0) if weighted else torch.zeros_like(by_member[0])
