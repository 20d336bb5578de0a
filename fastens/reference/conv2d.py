"""Member-batched two-dimensional convolution with a residual block's other operations around it, naively."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.reference._activation import activate
from fastens.reference._rows import affine, expand_rows, modulate
from fastens.reference.conv import conv
from fastens.reference.group_moments import counts, group_moments, normalized


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    offsets: Tensor | None = None,
    moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    row_bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    output_activation: str = "none",
    num_groups: int = 0,
    shared: bool = False,
    tiling: str = "auto",
    skip: Tensor | None = None,
    skip_moments: Tensor | None = None,
    norm_groups: int = 0,
    mask: Tensor | None = None,
    mask_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Norm, activate, convolve, add, scale and activate; then moments. As in :func:`fastens.ops.conv2d.conv2d`."""
    x, moments = together(x, skip, moments, skip_moments, norm_groups)
    x = prepared(x, moments, norm_weight, norm_bias, eps, offsets, scale, shift, activation)
    if mask is not None:
        x = x * (keeps(mask, x, weight.shape[0], offsets) * mask_scale)
    if shared:
        x = x.repeat(weight.shape[0], 1, 1, 1)
    y = conv(x, weight, bias, stride, padding, (1, 1), False, (0, 0), 1, offsets)
    if row_bias is not None:
        y = y + row_bias[:, :, None, None]
    if residual is not None:
        y = y + residual
    y = activate(y if output_scale == 1 else y * output_scale, output_activation)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y, group_moments(y, num_groups) if num_groups else y.new_empty(0, dtype=wide)


def keeps(mask: Tensor, x: Tensor, num_members: int, offsets: Tensor | None) -> Tensor:
    """Ones and zeros like x [R, C, H, W]: bit c % 32 of word c // 32 of a place's is of channel c."""
    if mask.shape[0] != x.shape[0]:
        mask = expand_rows(mask, x.shape[0], offsets)
    bits = mask.unsqueeze(-1) >> torch.arange(32, dtype=mask.dtype, device=mask.device) & 1
    return bits.flatten(-2)[..., : x.shape[1]].movedim(-1, 1).to(x.dtype)


def together(
    x: Tensor, skip: Tensor | None, moments: Tensor | None, skip_moments: Tensor | None, norm_groups: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return x and skip as one image, and the moments of the norm's groups of it: those of their parts, joined."""
    num_groups = norm_groups or (0 if moments is None else moments.shape[1])
    if skip is not None:
        x = torch.cat([x, skip], 1)
        moments = None if moments is None or skip_moments is None else torch.cat([moments, skip_moments], 1)
    if moments is None or moments.shape[1] == num_groups:
        return x, moments
    per_part = x.shape[1] // moments.shape[1]
    held = moments.new_tensor([count * per_part for count in counts(x.shape[2:].numel())])
    means, scatter = moments.unflatten(1, (num_groups, -1)).unbind(-1)  # [R, N, G/N, T]
    mean = means.mean(2)  # parts have as many elements each
    between = held * (means - mean[:, :, None]).square().sum(2)  # Chan et al. 1979
    return x, torch.stack([mean, scatter.sum(2) + between], -1)


def prepared(
    x: Tensor,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    offsets: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """What is convolved: x, or its norm by the moments of its groups, mapped, and activated."""
    if moments is None:
        return activate(x, activation)
    y = affine(normalized(x, moments, eps), norm_weight, norm_bias, 1, offsets)
    return activate(modulate(y, scale, shift, 1), activation).to(x.dtype)
