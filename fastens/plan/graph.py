"""The graph of a folded pass: nodes in the order in which they run, whose operands are views of memory.

A recording is lowered to it once. Both back ends emit from it: steps of a program on a CPU, launches on a GPU. Buffers,
arguments and constants are named here and laid out there; sizes and strides are in elements.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

from fastens.plan.layout import Factors, followed, joined
from fastens.plan.memory import Constant
from fastens.program.block import Epilogue
from fastens.program.steps import Opcode
from fastens.trace.record import mapped

Code = list[tuple[Opcode, int, int, float]]
ACTIVATIONS = {"none": Opcode.COPY, "silu": Opcode.SILU, "gelu": Opcode.GELU, "gelu_tanh": Opcode.GELU_TANH}


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of a buffer, an argument or a constant: offset and strides in elements.

    Attributes:
        where: what has a dtype: see :mod:`fastens.plan.memory`.
    """

    where: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """The dtype that the elements were recorded in."""
        return self.where.dtype

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


def views(tree: Any) -> list[View]:
    """All views among operands."""
    found: list[View] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, into: list[View]) -> None:
    if isinstance(tree, View):
        into.append(tree)
    elif isinstance(tree, list | tuple | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            _collect(item, into)


# Operands that are more than a view


class Runs(NamedTuple):
    """Whose parameters each row takes: runs of ``rows`` belong to the members in turn, or to those that a view names.

    Attributes:
        rows: of a run.
        members: int64 [R / rows], the member of each run, known when the plan runs; none for the members in turn.
    """

    rows: int
    members: View | None = None


class Mask(NamedTuple):
    """What a dropout keeps: a bit for each channel of a pixel.

    Attributes:
        bits: [R or K, pixels, words], of as many channels a word as the target's masks have.
        runs: which rows have one mask.
        scale: factor of what is kept.
    """

    bits: View
    runs: Runs
    scale: float


class Source(NamedTuple):
    """What a node reads as one image: ``mask * act(scale * cat(images) + shift)``, each pixel ``up`` times both ways.

    Attributes:
        images: one or two, [R, C_i, H, W]; of fewer rows where row r reads the image of r % rows.
        up: how many times as many lines and columns.
        scale: [R, C], from a :class:`Norm`; none for no normalisation.
        shift: [R, C], beside ``scale``.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        mask: of dropout; none to keep all.
    """

    images: tuple[View, ...]
    up: int = 1
    scale: View | None = None
    shift: View | None = None
    activation: str = "none"
    mask: Mask | None = None

    @property
    def space(self) -> tuple[int, int]:
        """Lines and columns of the image."""
        height, width = self.images[0].size[2:]
        return height * self.up, width * self.up


# Nodes


@dataclasses.dataclass(eq=False)
class Node:
    """An operation with named operands; a :class:`View` is where a tensor will be.

    Attributes:
        name: of its kind, as reports count it.
        written: names of the operands that it writes.
    """

    name: ClassVar[str]
    written: ClassVar[tuple[str, ...]] = ("out",)

    @property
    def operands(self) -> dict[str, Any]:
        """All operands by name."""
        return dict(vars(self))

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
class Conv(Node):
    """A convolution, or a linear layer as one of 1x1 over tokens: its source, and an epilogue.

    It gives ``act((dropped * (conv(source) + row_bias) + residual) * output_scale / divisor)``.

    Attributes:
        out: [R, O, H', W'].
        weight: a stack [K, O, C, h, w].
        bias: [K, O], or none.
        padding: zeros above and to the left; how many are below and to the right follows from ``out``.
        dropped: a mask of the result; none to keep all.
    """

    name = "conv"
    out: View
    source: Source
    weight: Constant
    bias: Constant | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    runs: Runs
    epilogue: Epilogue[View]
    dropped: Mask | None = None
    divisor: float = 1.0


@dataclasses.dataclass(eq=False)
class Norm(Node):
    """Group normalisation as a scale and a shift of each row and channel, [R, C], which a :class:`Source` applies.

    With mean and variance of a group, ``(x - mean) / sqrt(var + eps) * weight_k + bias_k``, times ``1 + row_scale`` and
    plus ``row_shift``, is ``x * scale + shift``.

    Attributes:
        images: one or two, whose channels are one after the other.
        weight: [K, C] or [1, C], or none.
        bias: [K, C] or [1, C], or none.
        row_scale: [R, C], or none.
        row_shift: [R, C], or none.
    """

    name, written = "norm", ("scale", "shift")
    scale: View
    shift: View
    images: tuple[View, ...]
    groups: int
    weight: Constant | None
    bias: Constant | None
    row_scale: View | None
    row_shift: View | None
    eps: float
    runs: Runs


@dataclasses.dataclass(eq=False)
class Materialize(Node):
    """A source in memory, for what does not compute it as it reads."""

    name = "materialize"
    out: View
    source: Source

    def elementwise(self) -> list[Pointwise]:
        """The same as elementwise nodes, of the channels of each image apart; only without a mask."""
        nodes: list[Pointwise] = []
        source, channel, up = self.source, 0, self.source.up
        for image in source.images:
            _, channels, height, width = image.size
            size = (self.out.size[0], height, up, width, up, channels)
            row, _, y, x = image.stride
            inputs = [View(image.where, image.offset, size, (row, y, 0, x, 0, 1))]
            code: Code = []
            if source.scale is not None and source.shift is not None:
                for table in (source.scale, source.shift):
                    stride = (table.stride[0], 0, 0, 0, 0, 1)
                    inputs.append(View(table.where, table.offset + channel, size, stride))
                code += [(Opcode.MULTIPLY, 0, 1, 0.0), (Opcode.ADD, 3, 2, 0.0)]
            code.append((ACTIVATIONS[source.activation], len(inputs) + len(code) - 1, 0, 0.0))
            row, _, y, x = self.out.stride
            out = View(self.out.where, self.out.offset + channel, size, (row, up * y, y, up * x, x, 1))
            nodes.append(Pointwise(out, inputs, code))
            channel += channels
        return nodes


@dataclasses.dataclass(eq=False)
class Pointwise(Node):
    """A chain of elementwise instructions; the inputs are the first registers, each instruction writes the next one.

    All operands have one size, with strides of 0 where an input is repeated.
    """

    name = "pointwise"
    out: View
    inputs: list[View]
    code: Code

    @property
    def is_copy(self) -> bool:
        """Whether it only copies one operand."""
        return len(self.inputs) == len(self.code) == 1 and self.code[0][0] is Opcode.COPY


@dataclasses.dataclass(eq=False)
class LayerNorm(Node):
    """Layer norm of tokens [R, T, C]; weight and bias [K, C] or [1, C], or none."""

    name = "layer norm"
    out: View
    x: View
    weight: Constant | None
    bias: Constant | None
    eps: float
    runs: Runs


@dataclasses.dataclass(eq=False)
class Attention(Node):
    """``softmax(scale q k^T) v`` of heads [R, heads, tokens, width], without mask."""

    name = "attention"
    out: View
    q: View
    k: View
    v: View
    scale: float


@dataclasses.dataclass(eq=False)
class Gather(Node):
    """The line of each row's member in a table: [R, n] of [K, n]."""

    name = "gather"
    out: View
    table: Any  # a view or a tensor
    members: View


@dataclasses.dataclass(eq=False)
class Draw(Node):
    """The bits of fresh dropout masks, of one dropout or of several that differ in nothing else.

    Attributes:
        bits: each [R, pixels, words].
        drawn: int64, the number of the evaluation and then the key of each dropout.
        keys: of each dropout, which of those is its own.
        members: int64 [R], or none for runs of ``rows_per_member`` in turn.
        samples: int64 [R].
        threshold: what a random number of 32 bits stays below where an element is dropped.
        channels: of each.
        steps: of each, what a pixel and a channel add to an element's number.
    """

    name, written = "draw", ("bits",)
    bits: list[View]
    drawn: View
    keys: list[int]
    members: View | None
    samples: View
    rows_per_member: int
    threshold: int
    channels: list[int]
    steps: list[tuple[int, int]]


@dataclasses.dataclass(eq=False)
class TorchCall(Node):
    """An operation of torch, which writes to memory that was laid out beforehand; constants are in their place."""

    written = ("outs",)
    outs: list[View]
    func: Any
    args: Any
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # of a property
        """The name of the operation in torch, by which reports count it."""
        return str(self.func)


@dataclasses.dataclass(eq=False)
class Outputs(Node):
    """No operation: stands for what reads the outputs of the pass."""

    name, written = "outputs", ()
    views: list[View]
