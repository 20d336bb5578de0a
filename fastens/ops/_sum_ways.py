"""Ways of a convolution that is summed over members: what is before it in its kernel, or in a pass of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastens.ops._choice import Choice, Way
from fastens.ops._tma_ways import Block as Convolution
from fastens.ops._tma_ways import refuses_pass


class Sum(NamedTuple):
    """The arguments of the ways, in their order: those of :func:`fastens.ops.conv2d_sum.conv2d_sum`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    member_weights: list[float]
    stride: tuple[int, int]
    padding: tuple[int, int]
    moments: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"

    def before(self) -> Convolution:
        """What is before the convolution, as a pass takes it."""
        return Convolution(
            None, None, self.x, self.weight, None, self.stride, self.padding, (0, 0), self.moments, self.norm_weight,
            self.norm_bias, self.eps, self.scale, self.shift, self.activation,
        )  # fmt: skip


def key(*arguments: Any) -> str:
    """What the speed depends on but the device."""
    c = Sum(*arguments)
    parts = [
        f"{str(c.x.dtype).removeprefix('torch.')} x{list(c.x.shape)} w{list(c.weight.shape)} s{list(c.stride)} "
        f"p{list(c.padding)}",
        "" if c.weight[0].is_contiguous() else "kernels channels_last",
        "" if c.moments is None else f"norm{c.moments.shape[1]}",
        "" if c.scale is None else "by row",
        "" if c.activation == "none" else c.activation,
        torch.backends.cudnn.conv.fp32_precision if c.x.dtype == torch.float32 else "",
    ]
    return " ".join(filter(None, parts))


def fused(*arguments: Any) -> Tensor:
    """All of it in one kernel, which normalises and activates an element for each tap of the convolution's kernel."""
    from fastens.kernels.conv2d_sum import conv2d_sum

    return conv2d_sum(*arguments)


def apart(*arguments: Any) -> Tensor:
    """What is before the convolution in a pass, then the kernel with nothing before it."""
    from fastens.kernels.conv2d_sum import conv2d_sum

    c = Sum(*arguments)
    return conv2d_sum(c.before().prepared(), c.weight, c.bias, c.member_weights, c.stride, c.padding)


def refuses_apart(*arguments: Any) -> str | None:
    """Why that cannot be taken, or is the other way, or none."""
    before = Sum(*arguments).before()
    if before.begins_plain:
        return "nothing before the convolution"
    return refuses_pass(*before)


CHOICE = Choice("conv2d_sum", key, {"triton": Way(fused), "triton apart": Way(apart, refuses_apart)})
