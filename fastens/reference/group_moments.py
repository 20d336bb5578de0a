"""Mean and scatter of each group of channels, span by span, naively; and what a group norm makes of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 128  # places of the space that one pair of moments is about


def counts(space: int, span: int = SPAN) -> list[int]:
    """How many of ``space`` places each span holds."""
    return [min(span, space - start) for start in range(0, space, span)]


def group_moments(x: Tensor, num_groups: int) -> Tensor:
    """Mean, and sum of squared differences from it. Shapes as in :func:`fastens.ops.group_moments.group_moments`."""
    rows, space = x.shape[0], x.shape[2:].numel()
    held = counts(space)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(rows, num_groups, x.shape[1] // num_groups, space)
    padding = len(held) * SPAN - space
    spans = F.pad(wide, (0, padding)).unflatten(-1, (len(held), SPAN))  # [R, G, C/G, T, SPAN]
    exists = F.pad(wide.new_ones(space), (0, padding)).unflatten(0, (len(held), SPAN))
    mean = spans.sum((2, 4)) / wide.new_tensor([count * wide.shape[2] for count in held])  # [R, G, T]
    apart = (spans - mean[:, :, None, :, None]) * exists
    return torch.stack([mean, apart.square().sum((2, 4))], -1)


def normalized(x: Tensor, moments: Tensor, eps: float) -> Tensor:
    """Group norm of x [R, C, *space] without its affine map, by the moments [R, G, T, 2] of its spans."""
    rows, num_groups = moments.shape[:2]
    space, per_group = x.shape[2:].numel(), x.shape[1] // num_groups
    held = moments.new_tensor([count * per_group for count in counts(space)])
    total = space * per_group
    means, scatter = moments.unbind(-1)
    mean = (means * held).sum(-1, keepdim=True) / total  # Chan et al. 1979
    variance = (scatter + held * (means - mean).square()).sum(-1, keepdim=True) / total
    grouped = x.to(moments.dtype).reshape(rows, num_groups, -1)
    return ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
