"""Member-batched convolution whose results are summed over the members, naively."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.program.block import ConvBlock
from fastens.reference.conv2d import conv2d


def conv2d_sum(block: ConvBlock, member_weights: Sequence[float]) -> Tensor:
    """Convolve each member's rows and combine them. Shapes as in :func:`fastens.ops.conv2d_sum.conv2d_sum`."""
    y, _ = conv2d(block)
    by_member = y.unflatten(0, (block.weight.shape[0], -1))  # [K, B, O, H', W']
    weighted = [m * scores for m, scores in zip(member_weights, by_member, strict=True) if m]  # the others are not used
    return torch.stack(weighted).sum(0) if weighted else torch.zeros_like(by_member[0])
