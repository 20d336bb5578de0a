"""Member-batched two-dimensional convolution with a residual block's other operations around it, naively."""

import torch
from torch import Tensor

from fastens.program.block import ConvBlock, Epilogue, Prologue
from fastens.reference._activation import activate
from fastens.reference._rows import affine, expand_rows, modulate
from fastens.reference.conv import conv
from fastens.reference.group_moments import counts, group_moments, normalized


def conv2d(block: ConvBlock, tiling: str = "auto") -> tuple[Tensor, Tensor]:
    """Norm, activate, convolve, add, scale and activate; then moments. As in :func:`fastens.ops.conv2d.conv2d`."""
    prologue, num_members = block.prologue, block.weight.shape[0]
    x = prepared(block.x, prologue, block.offsets)
    if prologue.mask is not None:
        x = x * (keeps(prologue.mask, x, num_members, block.offsets) * prologue.mask_scale)
    if block.shared:
        x = x.repeat(num_members, 1, 1, 1)
    y = conv(x, block.weight, block.bias, block.stride, block.padding, (1, 1), False, (0, 0), 1, block.offsets)
    y = finished(y, block.epilogue)
    num_groups, wide = block.epilogue.num_groups, torch.promote_types(y.dtype, torch.float32)
    return y, group_moments(y, num_groups) if num_groups else y.new_empty(0, dtype=wide)


def finished(y: Tensor, epilogue: Epilogue) -> Tensor:
    """What is written, of the sums [R, O, H', W']."""
    if epilogue.row_bias is not None:
        y = y + epilogue.row_bias[:, :, None, None]
    if epilogue.residual is not None:
        y = y + epilogue.residual
    return activate(y if epilogue.output_scale == 1 else y * epilogue.output_scale, epilogue.output_activation)


def keeps(mask: Tensor, x: Tensor, num_members: int, offsets: Tensor | None) -> Tensor:
    """Ones and zeros like x [R, C, H, W]: bit c % 32 of word c // 32 of a place's is of channel c."""
    if mask.shape[0] != x.shape[0]:
        mask = expand_rows(mask, x.shape[0], offsets)
    bits = mask.unsqueeze(-1) >> torch.arange(32, dtype=mask.dtype, device=mask.device) & 1
    return bits.flatten(-2)[..., : x.shape[1]].movedim(-1, 1).to(x.dtype)


def together(x: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor | None]:
    """Return x and skip as one image, and the moments of the norm's groups of it: those of their parts, joined."""
    moments = prologue.moments
    num_groups = prologue.norm_groups or (0 if moments is None else moments.shape[1])
    if prologue.skip is not None:
        x = torch.cat([x, prologue.skip], 1)
        if moments is not None and prologue.skip_moments is not None:
            moments = torch.cat([moments, prologue.skip_moments], 1)
    if moments is None or moments.shape[1] == num_groups:
        return x, moments
    per_part = x.shape[1] // moments.shape[1]
    held = moments.new_tensor([count * per_part for count in counts(x.shape[2:].numel())])
    means, scatter = moments.unflatten(1, (num_groups, -1)).unbind(-1)  # [R, N, G/N, T]
    mean = means.mean(2)  # parts have as many elements each
    between = held * (means - mean[:, :, None]).square().sum(2)  # Chan et al. 1979
    return x, torch.stack([mean, scatter.sum(2) + between], -1)


def prepared(x: Tensor, prologue: Prologue, offsets: Tensor | None) -> Tensor:
    """What is convolved but for its mask: x, or its norm by the moments of its groups, mapped, and activated."""
    x, moments = together(x, prologue)
    if moments is None:
        return activate(x, prologue.activation)
    y = affine(normalized(x, moments, prologue.eps), prologue.norm_weight, prologue.norm_bias, 1, offsets)
    return activate(modulate(y, prologue.scale, prologue.shift, 1), prologue.activation).to(x.dtype)
