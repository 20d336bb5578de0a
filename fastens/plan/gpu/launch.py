"""The nodes that launches are, beside those of every graph: what kernels of a GPU take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastens.plan.gpu import calls as run
from fastens.plan.graph import Attention, Draw, Gather, Node, Pointwise, TorchCall, View
from fastens.plan.torch_call import call
from fastens.program.block import ConvBlock, Prologue


@dataclasses.dataclass(frozen=True)
class Entry:
    """An input of the pass as launches read it: copied, as it is given, to these strides and this dtype."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Conv(Node):
    """A convolution with its prologue and epilogue, and where the moments of its result are written."""

    name, written = "conv2d", ("out", "moments")
    out: View
    block: ConvBlock[View]
    moments: View | None

    def change(self, **fields: Any) -> None:
        """Give fields of the block, its prologue or its epilogue other values."""
        self.block = self.block.replace(**fields)


@dataclasses.dataclass(eq=False)
class Moments(Node):
    """Moments [R, G, T, 2] of an image."""

    name = "moments"
    out: View
    x: View
    num_groups: int


@dataclasses.dataclass(eq=False)
class MomentsOfTwo(Moments):
    """Moments of two images whose channels are one after the other, until it is placed who takes those of each."""

    skip: View


@dataclasses.dataclass(eq=False)
class GroupNorm(Node):
    """The prologue of a convolution in a launch of its own."""

    name = "group norm"
    out: View
    x: View
    prologue: Prologue[View]
    offsets: View | None


@dataclasses.dataclass(eq=False)
class Join(Node):
    """Images one after the other along the channels, each pixel ``up`` times in both directions."""

    name = "join"
    out: View
    images: list[View]
    up: int


@dataclasses.dataclass(eq=False)
class Linear(Node):
    """A linear layer of the channels of images, and the activation behind it."""

    name = "linear"
    out: View
    x: View
    weight: Tensor
    bias: Tensor | None
    activation: str
    offsets: View | None


@dataclasses.dataclass(eq=False)
class LinearGroup(Node):
    """Linear layers of the same images."""

    name, written = "linear group", ("outs",)
    outs: list[View]
    x: View
    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str


@dataclasses.dataclass(eq=False)
class LayerNorm(Node):
    """Layer norm of tokens [R, T, C]."""

    name = "layer norm"
    out: View
    x: View
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offsets: View | None


@dataclasses.dataclass(eq=False)
class Masked(Node):
    """An image under a dropout mask."""

    name = "masked"
    out: View
    x: View
    bits: View | Tensor
    scale: float


_WITH_BACKEND: dict[type, Callable[..., Any]] = {
    Conv: run.conv2d,
    Moments: run.moments,
    GroupNorm: run.group_norm,
    Join: run.join,
    Pointwise: run.pointwise,
    Linear: run.linear,
    LinearGroup: run.linear_group,
    LayerNorm: run.layer_norm,
    Attention: run.attention,
    Draw: run.draw,
    Masked: run.masked,
}
_LAUNCHED: dict[type, Callable[..., Any]] = {**_WITH_BACKEND, Gather: run.gather, TorchCall: call}


def function_of(node: Node) -> Callable[..., Any]:
    """What is called with a node's operands by name."""
    return _LAUNCHED[type(node)]


def arguments_of(node: Node, backend: str) -> dict[str, Any]:
    """The arguments of that call, by name, views where tensors will be."""
    return {**node.operands, "backend": backend} if type(node) in _WITH_BACKEND else node.operands
