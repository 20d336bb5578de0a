"""Building a graph: lazily kept values become nodes when somebody needs them in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor

from fastens.plan import graph
from fastens.plan.graph import Code, Runs, Source, View
from fastens.plan.lowering.images import materialized, padded
from fastens.plan.lowering.target import Target
from fastens.plan.lowering.values import (
    Activated,
    Apply,
    Chain,
    Convolved,
    Dropped,
    Enlarged,
    Expression,
    Joined,
    Leaf,
    Normed,
    Padded,
    Pixels,
    Scores,
    Stored,
    Value,
    instructions,
)
from fastens.plan.memory import ALIGNMENT, HALVES, Argument, Buffer, Cast, Constant, Memory, address_unit
from fastens.program import steps
from fastens.program.block import Epilogue
from fastens.trace.record import NotLowerable, Recording, Ref


class Builder:
    """Nodes in the order in which they run, and where every value is.

    Attributes:
        target: the back end that the graph is for.
        nodes: the nodes.
        arguments: the inputs and, behind them, the outputs of the pass.
        buffers: that the nodes read and write.
        values: by storage, what is known of its value.
        uses: by storage, how many operations and results read it.
        copies: what was copied so that its channels are contiguous.
        row_members: of a pass whose rows are dealt out when it runs, the member of each row.
    """

    def __init__(self, recording: Recording, num_members: int, target: Target) -> None:
        self.recording = recording
        self.num_members = num_members
        self.target = target
        self.nodes: list[graph.Node] = []
        self.arguments: list[Argument] = []
        self.values: dict[int, Value] = {}
        self.uses: Counter[int] = Counter()
        self.buffers: list[Buffer] = []
        self.copies: dict[Ref, Pixels] = {}
        self.row_members: View | None = None

    @property
    def device(self) -> torch.device:
        """Where the pass was recorded."""
        return self.recording.tensors[self.recording.inputs[0].storage].device

    # Places

    def argument(self, dtype: torch.dtype) -> Argument:
        """A further argument of the call."""
        self.arguments.append(Argument(len(self.arguments), dtype))
        return self.arguments[-1]

    def buffer(self, elements: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """A new buffer for elements recorded in a dtype, whole vectors of it."""
        size = address_unit(dtype) if self.target.widens else dtype.itemsize
        made = Buffer(-(-elements * size // ALIGNMENT) * ALIGNMENT + ALIGNMENT, dtype=dtype)
        self.buffers.append(made)
        return made

    def table(self, rows: int, columns: int) -> View:
        """A new buffer for [rows, columns] of float32."""
        return View(self.buffer(rows * columns), 0, (rows, columns), (columns, 1))

    def runs(self, num_rows: int, offsets: Ref | None, members: int) -> Runs | None:
        """Whose of ``members`` parameters ``num_rows`` rows take; none where that was recorded."""
        if offsets is None:
            return Runs(max(1, num_rows // members))
        if self.row_members is None:
            return None
        return Runs(num_rows // self.row_members.size[0], self.row_members)

    def constant(self, ref: Ref) -> Tensor | None:
        """The tensor of a reference that does not depend on the inputs."""
        return None if ref.storage in self.values else self.recording.constant(ref)

    def stored(self, ref: Ref) -> View:
        """A view of a value in memory; a value that was kept lazily is computed by a node added here."""
        value = self.values.get(ref.storage)
        if value is None:
            raise NotLowerable("a constant where a value was expected")
        if not isinstance(value, Stored):
            value = self._store(ref.storage, value)
        where = value.where
        if where.dtype != ref.dtype:
            if self._widened(where):
                raise NotLowerable(f"{where.dtype} that is read as {ref.dtype}")
            where = Cast(where.where if isinstance(where, Cast) else where, ref.dtype)
        return View(where, ref.offset, ref.size, ref.stride)

    def _widened(self, where: Memory) -> bool:
        """Whether memory holds half precision in float32."""
        return self.target.widens and isinstance(where, Buffer) and where.dtype in HALVES

    def operand(self, ref: Ref, like: tuple[int, ...] = ()) -> View:
        """A view of an elementwise operand, a constant laid out like strides are."""
        constant = self.constant(ref)
        if constant is None:
            return self.stored(ref)
        dense = constant
        for d, stride in enumerate(ref.stride):
            dense = dense.narrow(d, 0, 1) if stride == 0 and dense.shape[d] > 1 else dense
        order = list(range(dense.ndim))
        if len(like) == dense.ndim:
            order.sort(key=lambda d: -like[d])
        laid = dense.permute(order)
        strides = dict(zip(order, laid.contiguous().stride(), strict=True))
        broadcast = tuple(0 if n == 1 else strides[d] for d, n in enumerate(dense.shape))
        return View(Constant(("dense", ref, *order), laid, dense), 0, ref.size, broadcast)

    def image(self, pixels: Pixels) -> View:
        """Pixels in memory as an operand [R, C, H, W]."""
        size = (pixels.rows, pixels.channels, pixels.height, pixels.width)
        constant = self.constant(pixels.ref)
        if constant is None:
            view = self.stored(pixels.ref)
            if not self.readable(pixels.ref):
                raise NotLowerable(f"an image of {pixels.ref.dtype}")
            return View(view.where, view.offset, size, (pixels.row, 1, pixels.y, pixels.x))
        dense = constant.as_strided(
            (pixels.rows, pixels.height, pixels.width, pixels.channels),
            (pixels.row, pixels.y, pixels.x, 1),
            pixels.ref.offset,
        )
        row, y, x = (n * pixels.channels for n in (pixels.height * pixels.width, pixels.width, 1))
        return View(Constant(("image", pixels), dense, dense), 0, size, (row, 1, y, x))

    def readable(self, ref: Ref) -> bool:
        """Whether nodes read a value as it is where it is."""
        return ref.dtype in (self.target.read_in_buffers if self.inside(ref) else self.target.read_in_arguments)

    def inside(self, ref: Ref) -> bool:
        """Whether a value is in a buffer of its dtype, as nodes hold it, or will be."""
        value = self.values.get(ref.storage)
        if isinstance(value, Stored):
            return isinstance(value.where, Buffer) and value.where.dtype == ref.dtype
        return not (isinstance(value, Expression) and value.rounds and self.target.widens)

    # Reading

    def chain(self, pixels: Pixels) -> Chain:
        """How a node can read these pixels: from memory, or computed on the way."""
        value = self.values.get(pixels.ref.storage)
        if value is None or isinstance(value, Stored | Convolved | Expression | Padded | Scores):
            return Chain([pixels])
        if not value.pixels.same_place(pixels):
            self.stored(pixels.ref)
            return Chain([pixels])
        found = self._on_the_way(value, pixels)
        if found is None and (pixels.height, pixels.width) == (value.pixels.height, value.pixels.width):
            for part in value.parts if isinstance(value, Joined) else (value.inner,):
                if self.constant(part.ref) is None:
                    self.stored(part.ref)
            found = self._on_the_way(value, pixels)
            if found is None:
                raise NotLowerable(f"a {type(value).__name__.lower()} image in this layout")
        elif found is None:  # the lines of the image are others than those that it was made in
            self.stored(pixels.ref)
            return Chain([pixels])
        return found

    def _on_the_way(self, value: Activated | Dropped | Normed | Joined | Enlarged, pixels: Pixels) -> Chain | None:
        """The chain that computes a value while it is read, none where what it reads is not simple enough."""
        height, width = pixels.height, pixels.width
        if isinstance(value, Joined):
            parts = [self._inner(part, height, width) for part in value.parts]
            if any(part is None or not part.plain or len(part.images) != 1 for part in parts):
                return None
            return Chain([part.images[0] for part in parts if part is not None])
        if isinstance(value, Enlarged):
            height, width = height // value.factor, width // value.factor
            if (pixels.height, pixels.width) != (value.pixels.height, value.pixels.width):
                return None
        inner = self._inner(value.inner, height, width)
        if inner is None:
            return None
        if isinstance(value, Enlarged):
            return None if inner.factor != 1 else dataclasses.replace(inner, factor=value.factor)
        if inner.mask is not None:
            return None
        if isinstance(value, Dropped):
            words = len(inner.images) == 1 or inner.images[0].channels % steps.LANES == 0
            return dataclasses.replace(inner, mask=value.mask) if words and inner.factor == 1 else None
        if inner.activation != "none":
            return None
        if isinstance(value, Activated):
            return dataclasses.replace(inner, activation=value.activation)
        return None if inner.tables is not None else dataclasses.replace(inner, tables=self.tables(value))

    def _inner(self, pixels: Pixels, height: int, width: int) -> Chain | None:
        reshaped = pixels.reshaped(height, width)
        return None if reshaped is None else self.chain(reshaped)

    def plain(self, pixels: Pixels) -> Chain:
        """The same without normalisation, activation, mask and enlargement, which are computed first."""
        chain = self.chain(pixels)
        if chain.plain:
            return chain
        self.stored(pixels.ref)
        return Chain([pixels])

    def tables(self, value: Normed) -> tuple[View, View]:
        """Scale and shift of a normalisation, [R, C] each, by a node that is added when they are first asked for."""
        if value.tables is None:
            chain = self.plain(value.inner)
            rows, channels = value.pixels.rows, value.pixels.channels
            value.tables = (self.table(rows, channels), self.table(rows, channels))
            images = self._images(chain)
            self.add(
                graph.Norm(
                    *value.tables, images, value.groups, value.weight, value.bias, value.row_scale, value.row_shift,
                    value.eps, value.runs,
                )
            )  # fmt: skip
        return value.tables

    def _images(self, chain: Chain) -> tuple[View, ...]:
        return tuple(self.image(pixels) for pixels in chain.images)

    def source(self, chain: Chain) -> Source:
        """A chain as the operand of a node."""
        scale, shift = chain.tables or (None, None)
        return Source(self._images(chain), chain.factor, scale, shift, chain.activation, chain.mask)

    # Writing

    def store(self, storage: int) -> None:
        """Compute a value into memory now, if that was not done yet."""
        self._store(storage, self.values[storage])

    def add(self, node: graph.Node) -> None:
        """Append a node."""
        self.nodes.append(node)

    def _store(self, storage: int, value: Value) -> Stored:
        if isinstance(value, Stored):
            return value
        if isinstance(value, Scores):
            value.compute()
            return self._store(storage, self.values[storage])
        ref = value.ref if isinstance(value, Expression) else value.pixels.ref
        where = self.buffer(ref.span, ref.dtype)
        rounded = isinstance(value, Expression) and value.rounds and self.target.widens
        place = Stored(Cast(where, ref.dtype) if rounded else where)
        self._write(value, place.where)
        self.values[storage] = place
        return place

    def _write(self, value: Value, where: Memory) -> None:
        if isinstance(value, Expression):
            self.expression(value.root, View(where, 0, value.ref.size, value.ref.stride))
        elif isinstance(value, Convolved):
            self.convolution(value, where)
        elif isinstance(value, Padded):
            padded(self, value, where)
        elif isinstance(value, Activated | Dropped | Normed | Joined | Enlarged):
            materialized(self, value, where)

    def convolution(self, value: Convolved, where: Memory, offset: int = 0) -> None:
        """Append the convolution that computes a value into memory.

        It computes of its input what nothing else needs in memory: ``pad(x)`` is its own padding.
        """
        pixels, padding = value.pixels, value.padding
        inner = self.values.get(value.inner.ref.storage)
        read = value.inner
        if isinstance(inner, Padded) and inner.pixels.same_place(read):
            padding = (padding[0] + inner.padding[2], padding[1] + inner.padding[0])
            read = inner.inner
        source = self.source(self.chain(read))
        residual = None if value.residual is None else self.image(value.residual)
        weight: Tensor = value.weight
        bias = None if value.bias is None else Constant(("bias", value.key), value.bias, value.bias)
        size = (pixels.rows, weight.shape[1], pixels.height, pixels.width)
        self.add(
            graph.Conv(
                View(where, offset, size, (pixels.row, 1, pixels.y, pixels.x)), source,
                Constant(value.key, weight, weight), bias, value.stride, padding, value.runs,
                Epilogue(value.row_bias, residual, float(value.scale), value.activation), value.mask,
                float(value.divisor),
            )
        )  # fmt: skip

    def pointwise(self, out: View, inputs: list[View], code: Code) -> None:
        """Append an elementwise node, unless there is nothing to compute."""
        if all(out.size):
            self.add(graph.Pointwise(out, inputs, code))

    def expression(self, root: Leaf | Apply, out: View) -> None:
        """Append the node that computes an expression into memory."""
        leaves, code = instructions(root)
        inputs = []
        for leaf in leaves:
            x = self.operand(leaf.ref, out.stride)
            missing = len(out.size) - len(x.size)
            stride = (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(x.size, x.stride, strict=True))
            inputs.append(View(x.where, x.offset, out.size, stride))
        self.pointwise(out, inputs, code)
