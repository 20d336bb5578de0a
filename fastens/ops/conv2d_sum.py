"""The last convolution under a linear rule: summed over the members, so that only the aggregate is written."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_rows, check_stack
from fastens.ops.conv2d import check_norm, output_size
from fastens.reference import conv2d_sum as reference


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    member_weights: list[float],
    stride: Sequence[int],
    padding: Sequence[int],
    *_: object,
) -> Tensor:
    size = (x.shape[0] // weight.shape[0], weight.shape[1], *output_size(x, weight, stride, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_conv2d_sum = Op(
    "conv2d_sum(Tensor x, Tensor weight, Tensor? bias, float[] member_weights, SymInt[] stride, SymInt[] padding, "
    "Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, "
    "str activation) -> Tensor",
    reference.conv2d_sum,
    {"triton": _fake},
)


def conv2d_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    member_weights: Sequence[float],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    *,
    moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Convolve each member's rows and sum over the members: ``sum_k m_k (conv(act(norm(x_k)), W_k) + b_k)``.

    What a network ends in under the rules mean (m_k = 1/K, or its weights) and sum (m_k = 1). Members are part of the
    sum that a convolution is, so their outputs are neither written nor rounded.

    Args:
        x: [K B, C, H, W], rows grouped by member.
        weight: [K, O, C, h, w].
        bias: [K, O], or none.
        member_weights: K numbers m_k; a member of zero is not used, NaN or not.
        stride: down and to the right.
        padding: zeros above and below, left and right; of what the norm gives.
        moments: [K B, G, T, 2] of x, as for :func:`fastens.ops.conv2d.conv2d`; none for no norm.
        norm_weight: [K, C], or none.
        norm_bias: [K, C], or none.
        eps: added to the variance.
        scale: [K B, C], or none.
        shift: [K B, C], or none.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"`` of what is convolved.
        backend: the code that runs it.

    Returns:
        [B, O, H', W'].

    Raises:
        ValueError: rows that cannot be dealt out to the members, shapes that do not fit, or an unknown activation or
            backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    if x.ndim != 4 or weight.ndim != 5:
        raise ValueError(
            f"conv2d_sum: x is {list(x.shape)} and weight {list(weight.shape)}, expected [R, C, H, W] and "
            "[K, O, C, h, w]"
        )
    num_members, outputs, channels = weight.shape[:3]
    check_rows("conv2d_sum", x, num_members, None)
    if x.shape[1] != channels:
        raise ValueError(f"conv2d_sum: x has {x.shape[1]} channels, weight expects {channels}")
    if len(member_weights) != num_members:
        raise ValueError(f"conv2d_sum: {len(member_weights)} member_weights, expected {num_members}")
    if min(output_size(x, weight, stride, padding)) < 1:
        raise ValueError(f"conv2d_sum: x is {list(x.shape)}, smaller than the kernel {list(weight.shape[3:])}")
    parts = {"norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
    check_norm("conv2d_sum", x, num_members, moments, parts)
    check_activation("conv2d_sum", activation, ACTIVATIONS)
    check_stack("conv2d_sum", "bias", bias, (num_members, outputs))
    tensors = [x, weight, *(t for t in (bias, norm_weight, norm_bias, scale, shift) if t is not None)]
    return _conv2d_sum.resolve(backend, tensors)(
        x, weight, bias, list(member_weights), stride, padding, moments, norm_weight, norm_bias, eps, scale, shift,
        activation,
    )  # fmt: skip
