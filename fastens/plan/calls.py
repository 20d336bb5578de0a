"""What the launches of a plan call: each writes its first argument, which was laid out beforehand, and returns nothing.

``backend`` is ``"auto"``, ``"triton"`` or ``"reference"``, as for the ops; shapes are those of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.ops import conv2d_sum as sum_op
from fastens.ops import group_moments as moments_op
from fastens.ops import group_norm as norm_op
from fastens.ops import layer_norm as layer_norm_op
from fastens.ops import linear as linear_op
from fastens.ops import linear_group as group_op
from fastens.ops._block_ways import CHOICE
from fastens.program.steps import Opcode
from fastens.reference._activation import activate
from fastens.reference.group_moments import counts


def conv2d(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    backend: str,
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
    found: Tensor | None = None,
    num_groups: int = 0,
    shared: bool = False,
    skip: Tensor | None = None,
    skip_moments: Tensor | None = None,
    norm_groups: int = 0,
) -> None:
    """A convolution with what is before and behind it, and moments of its result into ``found``.

    ``padding`` is above and to the left; how many zeros are below and to the right follows from the size of ``out``.
    """
    if shared:
        _shared_conv2d(out, x, weight, bias, stride, padding, backend, found, num_groups, row_bias, residual,
                       output_scale, output_activation)  # fmt: skip
        return
    x, moments = whole_image(x, moments, skip, skip_moments, norm_groups)
    arguments = (
        out, found, x.to(weight.dtype), weight, bias, stride, padding, tuple(out.shape[2:]), moments, norm_weight,
        norm_bias, eps, scale, shift, activation, row_bias, residual, output_scale, output_activation, num_groups,
    )  # fmt: skip
    way = "library"
    if uses_triton(x, backend) and CHOICE.ways["triton"].refuses(*arguments) is None:
        # ways are measured, and compared, on results in memory of their own; on the CPU nothing is measured
        way = CHOICE.choose((None, None, *arguments[2:]), x.device, "auto" if x.is_cuda else "triton")
    CHOICE.ways[way].run(*arguments)


def whole_image(
    x: Tensor, moments: Tensor | None, skip: Tensor | None, skip_moments: Tensor | None, norm_groups: int
) -> tuple[Tensor, Tensor | None]:
    """An image joined with the one that follows it, and the moments of the groups of its norm."""
    if moments is not None and norm_groups:
        parts = moments if skip_moments is None else torch.cat([moments, skip_moments], 1)
        channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        held = parts.new_tensor(counts(x.shape[2:].numel())) * (channels // parts.shape[1])  # [T]
        means, scatter = parts.unflatten(1, (norm_groups, -1)).unbind(-1)  # [R, G, parts, T]
        mean = means.mean(2, keepdim=True)
        moments = torch.stack([mean[:, :, 0], (scatter + held * (means - mean).square()).sum(2)], -1)
    return x if skip is None else torch.cat([x, skip], 1).contiguous(memory_format=torch.channels_last), moments


def _shared_conv2d(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
    backend: str, found: Tensor | None, num_groups: int, row_bias: Tensor | None, residual: Tensor | None,
    output_scale: float, output_activation: str,
) -> None:  # fmt: skip
    """A convolution of rows that all members share, which the kernel reads once; the library reads them repeated."""
    if uses_triton(x, backend):
        from fastens.kernels.conv2d import conv2d as launch

        launch(
            x, weight, bias, stride, padding, row_bias=row_bias, residual=residual, output_scale=output_scale,
            output_activation=output_activation, num_groups=num_groups, shared=True, into=(out, found),
        )  # fmt: skip
        return
    repeated = x.repeat(weight.shape[0], 1, 1, 1)
    conv2d(
        out, repeated, weight, bias, stride, padding, backend=backend, found=found, num_groups=num_groups,
        row_bias=row_bias, residual=residual, output_scale=output_scale, output_activation=output_activation,
    )  # fmt: skip


def conv2d_sum(
    weights: list[float],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    backend: str,
    moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    **_: Any,
) -> Tensor:
    """The last convolution, summed over the members with their weights: [B, O, H', W'], contiguous."""
    y = sum_op.conv2d_sum(
        x.to(weight.dtype), weight, bias, weights, stride, padding, moments=moments, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, scale=scale, shift=shift, activation=activation, backend=_named(x, backend),
    )  # fmt: skip
    return y.contiguous()


def moments(out: Tensor, x: Tensor, num_groups: int, backend: str) -> None:
    """Moments of groups [R, G, T, 2] of an image that no convolution before it could take."""
    if uses_triton(x, backend):
        from fastens.kernels.group_moments import group_moments as launch

        launch(x, num_groups, into=out)
    else:
        out.copy_(moments_op.group_moments(x, num_groups, backend="reference"))


def group_norm(out: Tensor, x: Tensor, norm: dict[str, Any], activation: str, backend: str) -> None:
    """Group norm and activation of an image; without a norm, the activation alone."""
    if not norm:
        out.copy_(activate(x, activation))
        return
    fused = activation if activation in ("none", "silu") else "none"
    y = norm_op.group_norm(
        x, norm["norm_groups"] or norm["moments"].shape[1], norm["norm_weight"], norm["norm_bias"], norm["eps"], None,
        norm["scale"], norm["shift"], fused, backend=_named(x, backend),
    )  # fmt: skip
    out.copy_(y if fused == activation else activate(y, activation))


def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str) -> None:
    """A linear layer of the channels of images [R, C, H, W], and the activation behind it."""
    tokens = x.movedim(1, -1).to(weight.dtype)
    y = linear_op.linear(tokens, weight.flatten(2), bias, None, activation, backend=_named(x, backend))
    out.copy_(y.movedim(-1, 1))


def linear_group(
    outs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    backend: str,
) -> None:
    """Linear layers of the channels of the same images [R, C, H, W], and the activation behind them."""
    into = [out.movedim(1, -1) for out in outs]
    stacks = [weight.flatten(2) for weight in weights]
    group_op.linear_group(
        x.movedim(1, -1).to(weights[0].dtype), stacks, biases, activation, backend=_named(x, backend), into=into
    )


def layer_norm(out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> None:
    """Layer norm of tokens [R, T, C]."""
    out.copy_(layer_norm_op.layer_norm(x, x.shape[-1:], weight, bias, eps, backend=_named(x, backend)))


def attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Attention without mask, [R, heads, tokens, width]."""
    q, k, v = (x.to(out.dtype) for x in (q, k, v))
    out.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale))


def join(out: Tensor, images: Sequence[Tensor], up: int) -> None:
    """Images [R, C, H, W] one after the other along the channels, each pixel ``up`` times in both directions."""
    if up == 1:
        torch.cat(list(images), 1, out=out)
        return
    start = 0
    for image in images:
        part = out[:, start : start + image.shape[1]].unflatten(3, (-1, up)).unflatten(2, (-1, up))
        part.copy_(image[:, :, :, None, :, None].expand_as(part))
        start += image.shape[1]


UNARY: dict[Opcode, Callable[[Tensor], Tensor]] = {
    Opcode.SILU: F.silu,
    Opcode.GELU: F.gelu,
    Opcode.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Opcode.SIGMOID: torch.sigmoid,
    Opcode.TANH: torch.tanh,
    Opcode.EXP: torch.exp,
    Opcode.LOG: torch.log,
    Opcode.SIN: torch.sin,
    Opcode.COS: torch.cos,
    Opcode.SQRT: torch.sqrt,
    Opcode.SQUARE: torch.square,
    Opcode.RELU: torch.relu,
    Opcode.ABS: torch.abs,
}
BINARY: dict[Opcode, Callable[[Any, Any], Tensor]] = {
    Opcode.ADD: torch.add,
    Opcode.SUBTRACT: torch.sub,
    Opcode.MULTIPLY: torch.mul,
    Opcode.DIVIDE: torch.div,
}
NUMBERED: dict[Opcode, Callable[[Tensor, float], Tensor]] = {
    Opcode.ADD_NUMBER: torch.add,
    Opcode.MULTIPLY_NUMBER: torch.mul,
    Opcode.NUMBER_MINUS: lambda x, number: number - x,
    Opcode.NUMBER_OVER: lambda x, number: number / x,
}


def pointwise(out: Tensor, inputs: Sequence[Tensor], code: Sequence[tuple[Opcode, int, int, float]]) -> None:
    """A chain of elementwise instructions; the inputs are the first registers, each instruction writes the next one."""
    registers = list(inputs)
    if len(code) > 1:  # rounded once, at the end
        registers = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in registers]
    for opcode, a, b, number in code:
        if opcode is Opcode.COPY:
            registers.append(registers[a])
        elif opcode in UNARY:
            registers.append(UNARY[opcode](registers[a]))
        elif opcode in BINARY:
            registers.append(BINARY[opcode](registers[a], registers[b]))
        else:
            registers.append(NUMBERED[opcode](registers[a], number))
    out.copy_(registers[-1])


def call(outs: Sequence[Tensor], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """An operation of torch; one that changes an argument changes a copy, since values are written once."""
    if function._schema.is_mutable:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    results = [r for r in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(r, Tensor)]
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)


def uses_triton(x: Tensor, backend: str) -> bool:
    """Whether a launch on this tensor is one of Triton's kernels."""
    return backend == "triton" or (backend == "auto" and x.is_cuda)


def _named(x: Tensor, backend: str) -> str:
    return "auto" if x.is_cuda and backend == "triton" else backend
