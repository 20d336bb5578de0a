"""A launch of a plan on a GPU: a call, and the views of memory that it reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastens.plan.gpu import calls as run
from fastens.plan.lowering.views import Factors, followed, joined
from fastens.plan.torch_call import call
from fastens.program.block import ConvBlock, Prologue
from fastens.program.steps import Opcode
from fastens.trace.record import mapped

Code = list[tuple[Opcode, int, int, float]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An input of the pass as launches read it: copied, as it is given, to these strides and this dtype."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of a buffer, an entry, an output or a constant: offset and strides in elements."""

    where: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def same_image(self, other: View) -> bool:
        """Whether both are the same channels of the same pixels, [R, C, *space] with the space in any lines."""
        rows = self.size[0] == 1 or self.stride[0] == other.stride[0]
        channels = self.size[1] == 1 or self.stride[1] == other.stride[1]
        if (self.where, self.offset, *self.size[:2]) != (other.where, other.offset, *other.size[:2]):
            return False
        return rows and channels and self._space() == other._space()

    def _space(self) -> Factors:
        return joined([(n, s) for n, s in zip(self.size[2:], self.stride[2:], strict=True) if n > 1][::-1])

    def is_dense(self) -> bool:
        """Whether an image [R, C, H, W] has its channels last, and nothing between its elements."""
        _, channels, height, width = self.size
        expected = (height * width * channels, 1, width * channels, channels)
        return all(n == 1 or s == e for n, s, e in zip(self.size, self.stride, expected, strict=True))

    def through(self, copy: View, source: View) -> View | None:
        """The same elements where ``copy`` was copied from, none where that is no view."""
        found = factors_through(self, copy, source)
        if found is None or any(len(factors) > 1 for factors in map(joined, found[1])):
            return None
        return View(source.where, found[0], self.size, tuple(s[0][1] if s else 0 for s in map(joined, found[1])))


def factors_through(view: View, copy: View, source: View) -> tuple[int, list[Factors]] | None:
    """Offset of a view of ``copy`` in its source, and what each dimension is made of there, innermost first."""
    if view.where is not copy.where and view.where != copy.where:
        return None
    sizes = list(zip(view.size, view.stride, strict=True))
    found = followed(copy, source, view.offset, [[(n, s)] if n > 1 and s else [] for n, s in sizes])
    if found is None:
        return None
    repeated = [[(n, 0)] if n > 1 and not s else [] for n, s in sizes]
    return found[0], [once or again for once, again in zip(found[1], repeated, strict=True)]


@dataclasses.dataclass(eq=False)
class Launch:
    """A call with named operands, in the order of its function's parameters; a :class:`View` is where a tensor will be.

    Attributes:
        name: of its kind, as reports count it.
        function: what is called with the operands.
        written: names of the operands that it writes.
    """

    name: ClassVar[str]
    function: ClassVar[Callable[..., None]]
    written: ClassVar[tuple[str, ...]] = ("out",)

    @property
    def operands(self) -> dict[str, Any]:
        """What it is called with, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def writes(self) -> list[View]:
        """What it writes."""
        return views([getattr(self, name) for name in self.written])

    def reads(self) -> list[View]:
        """What it reads."""
        return views([value for name, value in self.operands.items() if name not in self.written])

    def replace(self, old: View, new: View) -> None:
        """Read something else instead of ``old``."""
        for name, value in self.operands.items():
            if name not in self.written:
                setattr(self, name, mapped(View, lambda view: new if view == old else view, value))


@dataclasses.dataclass(eq=False)
class Conv(Launch):
    """A convolution with its prologue and epilogue, and where the moments of its result are written."""

    name, function, written = "conv2d", staticmethod(run.conv2d), ("out", "moments")
    out: View
    block: ConvBlock[View]
    moments: View | None
    backend: str

    def change(self, **fields: Any) -> None:
        """Give fields of the block, its prologue or its epilogue other values."""
        self.block = self.block.replace(**fields)


@dataclasses.dataclass(eq=False)
class Moments(Launch):
    """Moments [R, G, T, 2] of an image."""

    name, function = "moments", staticmethod(run.moments)
    out: View
    x: View
    num_groups: int
    backend: str


@dataclasses.dataclass(eq=False)
class MomentsOfTwo(Moments):
    """Moments of two images whose channels are one after the other, until it is placed who takes those of each."""

    skip: View


@dataclasses.dataclass(eq=False)
class GroupNorm(Launch):
    """The prologue of a convolution in a launch of its own."""

    name, function = "group norm", staticmethod(run.group_norm)
    out: View
    x: View
    prologue: Prologue[View]
    offsets: View | None
    backend: str


@dataclasses.dataclass(eq=False)
class Join(Launch):
    """Images one after the other along the channels, each pixel ``up`` times in both directions."""

    name, function = "join", staticmethod(run.join)
    out: View
    images: list[View]
    up: int
    backend: str


@dataclasses.dataclass(eq=False)
class Pointwise(Launch):
    """A chain of elementwise instructions; the inputs are the first registers, each instruction writes the next one."""

    name, function = "pointwise", staticmethod(run.pointwise)
    out: View
    inputs: list[View]
    code: Code
    backend: str

    @property
    def is_copy(self) -> bool:
        """Whether it only copies one operand."""
        return len(self.inputs) == len(self.code) == 1 and self.code[0][0] is Opcode.COPY


@dataclasses.dataclass(eq=False)
class Linear(Launch):
    """A linear layer of the channels of images, and the activation behind it."""

    name, function = "linear", staticmethod(run.linear)
    out: View
    x: View
    weight: Tensor
    bias: Tensor | None
    activation: str
    backend: str
    offsets: View | None


@dataclasses.dataclass(eq=False)
class LinearGroup(Launch):
    """Linear layers of the same images."""

    name, function, written = "linear group", staticmethod(run.linear_group), ("outs",)
    outs: list[View]
    x: View
    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str
    backend: str


@dataclasses.dataclass(eq=False)
class LayerNorm(Launch):
    """Layer norm of tokens [R, T, C]."""

    name, function = "layer norm", staticmethod(run.layer_norm)
    out: View
    x: View
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    backend: str
    offsets: View | None


@dataclasses.dataclass(eq=False)
class Attention(Launch):
    """Attention without mask, [R, heads, tokens, width]."""

    name, function = "attention", staticmethod(run.attention)
    out: View
    q: View
    k: View
    v: View
    scale: float
    backend: str


@dataclasses.dataclass(eq=False)
class Gather(Launch):
    """The line of each row's member in a table."""

    name, function = "gather", staticmethod(run.gather)
    out: View
    table: View | Tensor
    members: View


@dataclasses.dataclass(eq=False)
class Draw(Launch):
    """The bits of fresh dropout masks, of one dropout or of several that differ in nothing else."""

    name, function, written = "draw", staticmethod(run.draw), ("bits",)
    bits: list[View]
    drawn: View
    keys: list[int]
    members: View | None
    samples: View
    rows_per_member: int
    threshold: int
    channels: list[int]
    steps: list[tuple[int, int]]
    backend: str


@dataclasses.dataclass(eq=False)
class Masked(Launch):
    """An image under a dropout mask."""

    name, function = "masked", staticmethod(run.masked)
    out: View
    x: View
    bits: View | Tensor
    scale: float
    backend: str


@dataclasses.dataclass(eq=False)
class TorchCall(Launch):
    """An operation of torch."""

    function, written = staticmethod(call), ("outs",)
    outs: list[View]
    func: Any
    args: Any
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # of a property
        """The name of the operation in torch, by which reports count launches."""
        return str(self.func)


@dataclasses.dataclass(eq=False)
class Outputs(Launch):
    """No launch: stands for what reads the outputs of the pass."""

    name, written = "outputs", ()
    views: list[View]


def views(tree: Any) -> list[View]:
    """All views among arguments."""
    found: list[View] = []
    mapped(View, found.append, tree)
    return found
