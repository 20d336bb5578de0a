"""Member-batched two-dimensional convolution with what a residual block does before and behind it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_rows, check_stack
from fastens.reference import conv2d as reference
from fastens.reference.group_moments import SPAN


def output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The space of the convolution of x [R, C, *space] by weights [K, O, C, *kernel]."""
    dilation = [1] * len(stride) if dilation is None else dilation
    return tuple(
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    offsets: Tensor | None,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    row_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    output_activation: str,
    num_groups: int,
    shared: bool,
    tiling: str,
    *_: object,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * (weight.shape[0] if shared else 1)
    height, width = output_size(x, weight, stride, padding)
    size = (rows, weight.shape[1], height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shape = (rows, num_groups, (height * width + SPAN - 1) // SPAN, 2) if num_groups else (0,)
    return y, x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


TILINGS = ("auto", "wide", "narrow")

_conv2d = Op(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, Tensor? offsets, "
    "Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, "
    "str activation, Tensor? row_bias, Tensor? residual, float output_scale, str output_activation, "
    "SymInt num_groups, bool shared, str tiling, Tensor? skip=None, Tensor? skip_moments=None, SymInt norm_groups=0, "
    "Tensor? mask=None, float mask_scale=1.0) -> (Tensor, Tensor)",
    reference.conv2d,
    {"triton": _fake},
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    offsets: Tensor | None = None,
    *,
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve each member's rows, with norm and activation before it and a residual block's additions behind it.

    ``act((conv(act'(norm(x)), W_k) + b_k + row_bias + residual) * output_scale)``; the norm takes x by given moments of
    its groups, ``((x - mean) / sqrt(var + eps) * norm_weight_k + norm_bias_k) * (1 + scale) + shift``. With the moments
    of the result beside it, the next convolution does the same: a residual block is two of these and nothing between.
    With ``skip``, x is ``cat([x, skip], 1)`` in all of this, which is never written; C below counts both.

    Args:
        x: [R, C - C2, H, W], rows grouped by member; [B, C, H, W] where ``shared``.
        weight: [K, O, C, h, w].
        bias: [K, O], or none.
        stride: down and to the right.
        padding: zeros above and below, left and right; of what the norm gives.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        moments: [R, G, T, 2] of x, from here or :func:`fastens.ops.group_moments.group_moments`; none for no norm. Its
            groups may be parts of the norm's groups, which are joined (Chan et al. 1979).
        norm_weight: [K, C], or none.
        norm_bias: [K, C], or none.
        eps: added to the variance.
        scale: [R, C], or none.
        shift: [R, C], or none.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"`` of what is convolved.
        row_bias: [R, O], such as the embedding of time, or none.
        residual: [R, O, H', W'], or none.
        output_scale: factor of the sum.
        output_activation: of the result.
        num_groups: groups of the O channels whose moments are returned; 0 for none.
        shared: every member convolves the same rows; R is K B.
        tiling: how a kernel cuts it, ``"auto"``, ``"wide"`` or ``"narrow"``; results differ in rounding alone.
        skip: [R, C2, H, W], images whose channels follow those of x; none for x alone.
        skip_moments: [R, G2, T, 2] of skip, of groups as large as those of ``moments``; with ``moments`` and ``skip``.
        norm_groups: groups of the norm of all C channels, of which one may be of both x and skip; 0 for as many as
            ``moments`` has.
        mask: int32 [R, H, W, ceil(C / 32)], or [K, H, W, ceil(C / 32)] where a member's rows have one mask: dropout of
            what is convolved, which keeps channel c where bit c % 32 of word c // 32 is set; none to keep all.
        mask_scale: factor of what is kept, 1 / (1 - p).
        backend: the code that runs it.

    Returns:
        [R, O, H', W'], and its moments [R, num_groups, T', 2] or none.

    Raises:
        ValueError: rows that cannot be dealt out to the members, shapes that do not fit, a norm, offsets, skip or
            mask beside ``shared``, parts of a norm without moments, or an unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    if x.ndim != 4 or weight.ndim != 5:
        raise ValueError(
            f"conv2d: x is {list(x.shape)} and weight {list(weight.shape)}, expected [R, C, H, W] and [K, O, C, h, w]"
        )
    num_members, outputs, channels = weight.shape[:3]
    if not shared:
        check_rows("conv2d", x, num_members, offsets)
    elif offsets is not None or moments is not None:
        raise ValueError("conv2d: shared rows have neither offsets nor moments: both are of rows that differ by member")
    elif skip is not None:
        raise ValueError("conv2d: shared rows have no skip: shared is for a first layer; give cat([x, skip], 1) as x")
    check_channels(x, skip, channels)
    check_mask(x, mask, num_members, channels, shared)
    height, width = output_size(x, weight, stride, padding)
    if min(height, width) < 1:
        raise ValueError(f"conv2d: x is {list(x.shape)}, smaller than the kernel {list(weight.shape[3:])}")
    parts = {"norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
    check_norm("conv2d", x, num_members, moments, parts, skip, skip_moments, norm_groups)
    if num_groups < 0 or (num_groups and outputs % num_groups):
        raise ValueError(f"conv2d: num_groups is {num_groups}, expected a divisor of the {outputs} output channels")
    for kind in (activation, output_activation):
        check_activation("conv2d", kind, ACTIVATIONS)
    if tiling not in TILINGS:
        raise ValueError(f"conv2d: tiling {tiling!r} is unknown, expected one of {', '.join(map(repr, TILINGS))}")
    rows = x.shape[0] * (num_members if shared else 1)
    check_stack("conv2d", "bias", bias, (num_members, outputs))
    check_stack("conv2d", "row_bias", row_bias, (rows, outputs), "rows first")
    check_stack("conv2d", "residual", residual, (rows, outputs, height, width), "rows first")
    optional = (bias, norm_weight, norm_bias, scale, shift, row_bias, residual, skip, moments, skip_moments)
    tensors = [x, weight, *(t for t in optional if t is not None)]
    y, found = _conv2d.resolve(backend, tensors)(
        x, weight, bias, stride, padding, offsets, moments, norm_weight, norm_bias, eps, scale, shift, activation,
        row_bias, residual, output_scale, output_activation, num_groups, shared, tiling, skip, skip_moments,
        norm_groups, mask, mask_scale,
    )  # fmt: skip
    return y, found if num_groups else None


def check_channels(x: Tensor, skip: Tensor | None, channels: int) -> None:
    """Raise unless x [R, C1, H, W], or x and skip [R, C2, H, W] together, have these channels."""
    if skip is None:
        if x.shape[1] != channels:
            raise ValueError(f"conv2d: x has {x.shape[1]} channels, weight expects {channels}")
        return
    rows, own, *space = x.shape
    if skip.ndim != 4 or (skip.shape[0], *skip.shape[2:]) != (rows, *space):
        raise ValueError(f"conv2d: skip is {list(skip.shape)}, expected {[rows, channels - own, *space]}, as x but C")
    if own + skip.shape[1] != channels:
        raise ValueError(f"conv2d: x and skip have {own} + {skip.shape[1]} channels, weight expects {channels}")
    if skip.dtype != x.dtype:
        raise ValueError(f"conv2d: skip is {skip.dtype}, expected {x.dtype}, as x")


def check_mask(x: Tensor, mask: Tensor | None, num_members: int, channels: int, shared: bool) -> None:
    """Raise unless mask has a bit for each element of these channels of x [R, _, H, W], of each row or member."""
    if mask is None:
        return
    if shared:
        raise ValueError("conv2d: shared rows have no mask: it is of rows that differ by member")
    sizes = [[rows, *x.shape[2:], (channels + 31) // 32] for rows in (x.shape[0], num_members)]
    if list(mask.shape) not in sizes or mask.dtype != torch.int32:
        raise ValueError(f"conv2d: mask is {mask.dtype} {list(mask.shape)}, expected int32 {sizes[0]} or {sizes[1]}")


def check_norm(
    op: str,
    x: Tensor,
    num_members: int,
    moments: Tensor | None,
    parts: dict[str, Tensor | None],
    skip: Tensor | None = None,
    skip_moments: Tensor | None = None,
    norm_groups: int = 0,
) -> None:
    """Raise unless moments and ``parts`` of a norm (norm_weight, norm_bias, scale, shift) of x, and skip, fit."""
    if moments is None:
        given = [name for name, part in (*parts.items(), ("skip_moments", skip_moments)) if part is not None]
        given += ["norm_groups"] * (norm_groups != 0)
        if given:
            raise ValueError(f"{op}: {', '.join(given)} without moments of x; take them by group_moments")
        return
    if (skip is None) != (skip_moments is None):
        raise ValueError(f"{op}: skip and skip_moments belong together where there are moments: give both or neither")
    rows, channels = x.shape[:2]
    spans = (math.prod(x.shape[2:]) + SPAN - 1) // SPAN
    groups = moments.shape[1] if moments.ndim == 4 else 0
    if groups < 1 or channels % groups or tuple(moments.shape) != (rows, groups, spans, 2):
        raise ValueError(
            f"{op}: moments is {list(moments.shape)}, expected [{rows}, G, {spans}, 2] with G groups of {channels} "
            "channels"
        )
    per_group, num_groups = channels // groups, norm_groups or groups
    if skip is not None and skip_moments is not None:
        shape = (rows, skip.shape[1] // per_group, spans, 2)
        if skip.shape[1] % per_group or tuple(skip_moments.shape) != shape:
            raise ValueError(
                f"{op}: skip_moments is {list(skip_moments.shape)}, expected {list(shape)}, groups of {per_group} of "
                f"skip's {skip.shape[1]} channels, as those of moments"
            )
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups or channels // num_groups % per_group:
        raise ValueError(
            f"{op}: norm_groups is {norm_groups}, expected a divisor of the {channels} channels whose groups are whole "
            f"groups of moments, of {per_group} channels"
        )
    for name in ("norm_weight", "norm_bias"):
        check_stack(op, name, parts[name], (num_members, channels))
    for name in ("scale", "shift"):
        check_stack(op, name, parts[name], (rows, channels), "rows first")
