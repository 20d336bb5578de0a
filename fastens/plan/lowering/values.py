"""Values of a recorded pass that are not computed yet, so that the node that needs one may compute it on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastens.plan.graph import Code, Mask, Runs, View
from fastens.plan.memory import HALVES, Constant, Memory
from fastens.program.steps import Opcode
from fastens.trace.record import Ref


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A tensor as images with contiguous channels: element strides of rows, lines and pixels.

    Attributes:
        channel_dim: which of the tensor's dimensions is the channels; sizes and strides alone do not tell.
    """

    ref: Ref
    channel_dim: int
    rows: int
    height: int
    width: int
    channels: int
    row: int
    y: int
    x: int

    @property
    def step(self) -> int | None:
        """The stride between pixels where they lie in one line, none where they do not."""
        if self.height == 1:
            return self.x
        if self.width == 1:
            return self.y
        return self.x if self.y == self.width * self.x else None

    def reshaped(self, height: int, width: int) -> Pixels | None:
        """The same pixels as lines of another width, none where that is not possible."""
        if (height, width) == (self.height, self.width):
            return self
        step = self.step
        if step is None or height * width != self.height * self.width:
            return None
        return dataclasses.replace(self, height=height, width=width, y=width * step, x=step)

    def same_place(self, other: Pixels) -> bool:
        """Whether both are the same pixels of the same storage."""
        if self.ref.storage != other.ref.storage or self.ref.offset != other.ref.offset:
            return False
        if (self.rows, self.channels) != (other.rows, other.channels) or (self.rows > 1 and self.row != other.row):
            return False
        moved = other.reshaped(self.height, self.width)
        if moved is None:
            return False
        return (self.height == 1 or self.y == moved.y) and (self.width == 1 or self.x == moved.x)


def pixels_of(ref: Ref, channel_dim: int) -> Pixels | None:
    """A tensor [R, C, *space] (``channel_dim`` 1) or [R, *tokens, C] (-1) as images; none in another layout.

    Up to two dimensions are between rows and channels.
    """
    if len(ref.size) < 2:
        return None
    channel_dim %= len(ref.size)
    dims = [d for d in range(1, len(ref.size)) if d != channel_dim]
    channels = ref.size[channel_dim]
    if len(dims) > 2 or (channels > 1 and ref.stride[channel_dim] != 1):
        return None
    sizes, strides = [1, 1, *(ref.size[d] for d in dims)][-2:], [0, 0, *(ref.stride[d] for d in dims)][-2:]
    return Pixels(ref, channel_dim, ref.size[0], sizes[0], sizes[1], channels, ref.stride[0], strides[0], strides[1])


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value in memory, laid out as torch laid it out when it was recorded.

    Attributes:
        where: the memory; a cast buffer has its bytes as torch has them, where others hold half precision in float32.
    """

    where: Memory


@dataclasses.dataclass
class Activated:
    """An activation of another value, pixel by pixel."""

    pixels: Pixels
    inner: Pixels
    activation: str


@dataclasses.dataclass
class Dropped:
    """A value under a dropout mask."""

    pixels: Pixels
    inner: Pixels
    mask: Mask


@dataclasses.dataclass
class Normed:
    """A group normalisation: its scale and shift per row and channel are computed when they are first needed."""

    pixels: Pixels
    inner: Pixels
    groups: int
    eps: float
    runs: Runs
    weight: Constant | None
    bias: Constant | None
    row_scale: View | None = None  # [R, C]
    row_shift: View | None = None
    tables: tuple[View, View] | None = None  # scale and shift, once they are computed


@dataclasses.dataclass
class Joined:
    """Two values one after the other along the channels."""

    pixels: Pixels
    parts: tuple[Pixels, Pixels]


@dataclasses.dataclass
class Enlarged:
    """Nearest-neighbour enlargement."""

    pixels: Pixels
    inner: Pixels
    factor: int


@dataclasses.dataclass
class Padded:
    """Zeros around an image: left, right, top, bottom."""

    pixels: Pixels
    inner: Pixels
    padding: tuple[int, int, int, int]


@dataclasses.dataclass
class Convolved:
    """A convolution or a linear layer, with what is done to its result."""

    pixels: Pixels  # of the result
    inner: Pixels
    weight: Any  # stack [K, C_out, C_in, kernel_h, kernel_w]
    bias: Any
    key: object
    stride: tuple[int, int]
    padding: tuple[int, int]  # top, left
    runs: Runs
    row_bias: View | None = None  # [R, O]
    mask: Mask | None = None  # before the residual is added
    residual: Pixels | None = None
    scale: float = 1.0
    divisor: float = 1.0
    activation: str = "none"

    @property
    def scaled(self) -> bool:
        """Whether a number follows already: two as their product would round once where the network rounds twice."""
        return self.scale != 1.0 or self.divisor != 1.0


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An operand of an expression, of any dtype."""

    ref: Ref


@dataclasses.dataclass(frozen=True)
class Apply:
    """An instruction on the results of others."""

    opcode: Opcode
    operands: tuple[Leaf | Apply, ...]
    number: float = 0.0


@dataclasses.dataclass
class Expression:
    """A chain of elementwise instructions.

    Attributes:
        rounds: whether the result is a conversion to half precision. What reads it otherwise than as the operand of a
            product or norm in half precision gets what the network asked for: a timestep of 999 is 1000 in bfloat16.
    """

    ref: Ref
    root: Leaf | Apply
    rounds: bool = False


def is_rounded(x: Ref, out: Ref) -> bool:
    """Whether a copy of ``x`` to ``out`` is a conversion to half precision."""
    return out.dtype in HALVES and x.dtype != out.dtype


@dataclasses.dataclass
class Scores:
    """Products q k^T [N, Q, K] times a number, and perhaps their softmax over the keys, for attention to take."""

    ref: Ref
    q: Ref  # [N, Q, D]
    k: Ref  # [N, K, D]
    scale: float
    softmax: bool
    compute: Callable[[], object]  # makes them an ordinary value, where something else than attention wants them


@dataclasses.dataclass
class Chain:
    """What a node computes as it reads: up to two images, normalised, then activated, then under a mask, enlarged."""

    images: list[Pixels]
    factor: int = 1
    tables: tuple[View, View] | None = None
    activation: str = "none"
    mask: Mask | None = None

    @property
    def plain(self) -> bool:
        """Whether it is images as they are in memory."""
        return self == Chain(self.images)


def collect_leaves(node: Leaf | Apply, into: list[Leaf]) -> None:
    """The distinct leaves of an expression, in order."""
    if isinstance(node, Leaf):
        if node not in into:
            into.append(node)
        return
    for operand in node.operands:
        collect_leaves(operand, into)


def instructions(root: Leaf | Apply) -> tuple[list[Leaf], Code]:
    """The distinct leaves of an expression, which are the first registers, and what computes it from them."""
    leaves: list[Leaf] = []
    code: Code = []
    collect_leaves(root, leaves)
    registers: dict[int, int] = {}

    def visit(node: Leaf | Apply) -> int:
        if isinstance(node, Leaf):
            return leaves.index(node)
        if id(node) not in registers:
            numbers = [visit(operand) for operand in node.operands]
            code.append((node.opcode, numbers[0], numbers[1] if len(numbers) == 2 else 0, node.number))
            registers[id(node)] = len(leaves) + len(code) - 1
        return registers[id(node)]

    last = visit(root)
    if isinstance(root, Leaf):
        code.append((Opcode.COPY, last, 0, 0.0))
    return leaves, code


Lazy = Activated | Dropped | Normed | Joined | Enlarged | Padded | Convolved | Expression | Scores
Value = Stored | Lazy
