"""Emitting steps: lazily kept values become steps when somebody needs them in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor

from fastens.plan.cpu.convolution import convolution
from fastens.plan.cpu.images import copied, padded
from fastens.plan.cpu.loops import simplified
from fastens.plan.cpu.packing import packed
from fastens.plan.lowering.values import (
    Activated,
    Apply,
    Convolved,
    Dropped,
    Enlarged,
    Expression,
    Joined,
    Leaf,
    Normed,
    Padded,
    Pixels,
    Runs,
    Scores,
    Source,
    Stored,
    Value,
    instructions,
)
from fastens.plan.memory import ALIGNMENT, At, Buffer, Constants, address_unit, or_none
from fastens.plan.torch_call import Call
from fastens.program import steps
from fastens.program.steps import Activation, Image, Opcode, Step, Strided
from fastens.trace.record import NotLowerable, Recording, Ref

_POINTWISE_GRAIN = 8192  # elements that are worth a task


class Emitter:
    """Steps in the order in which they run, and where every value is.

    Attributes:
        steps: the steps and calls.
        values: by storage, what is known of its value.
        uses: by storage, how many operations and results read it.
        floats: dtypes that steps compute in.
        exact: whether what a step computes is chosen by one row's shape.
        typed: whether buffers hold the dtypes that were recorded, and torch reads inputs in place.
        row_members: of a pass whose rows are dealt out when it runs, where the member of each row is, and the rows.
    """

    floats: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    typed = False

    def __init__(
        self, recording: Recording, num_members: int, num_threads: int, constants: Constants, exact: bool = False
    ) -> None:
        self.recording = recording
        self.num_members = num_members
        self.num_threads = num_threads
        self.exact = exact
        self.steps: list[Step | Call] = []
        self.values: dict[int, Value] = {}
        self.uses: Counter[int] = Counter()
        self.buffers: list[Buffer] = []
        self.constants = constants
        self.copies: dict[Ref, Pixels] = {}
        self.row_members: tuple[At, int] | None = None

    # Places

    def packed(self, value: Convolved, vectors: int, pairs: bool, squares: int) -> At:
        """The place of a convolution's weights, packed as :func:`fastens.plan.cpu.packing.pack` says."""
        return packed(self.constants, value.key, value.weight, vectors, pairs, squares)

    def buffer(self, elements: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """A new piece of the arena for elements recorded in a dtype, whole vectors of it."""
        size = dtype.itemsize if self.typed else address_unit(dtype)
        made = Buffer(-(-elements * size // ALIGNMENT) * ALIGNMENT + ALIGNMENT, dtype=dtype)
        self.buffers.append(made)
        return made

    def runs(self, num_rows: int, offsets: Ref | None, members: int) -> Runs | None:
        """Whose of ``members`` parameters ``num_rows`` rows take; none where that was recorded."""
        if offsets is None:
            return Runs(max(1, num_rows // members))
        if self.row_members is None:
            return None
        at, total = self.row_members
        return Runs(num_rows // total, at)

    def constant(self, ref: Ref) -> Tensor | None:
        """The tensor of a reference that does not depend on the inputs."""
        return None if ref.storage in self.values else self.recording.constant(ref)

    def kept(self, tensor: Tensor, key: object) -> At:
        """The place of a constant tensor, copied to its logical order if it is laid out otherwise."""
        return self.constants.add(key, tensor, tensor)

    def stored(self, ref: Ref) -> At:
        """The place of a value's first element; a value that was kept lazily is computed by a step added here."""
        value = self.values.get(ref.storage)
        if value is None:
            raise NotLowerable("a constant where a value was expected")
        if not isinstance(value, Stored):
            value = self._store(ref.storage, value)
        held_wide = ref.dtype in (torch.bfloat16, torch.float16)
        return value.at.plus(ref.offset, value.element_size if held_wide else ref.dtype.itemsize)

    def operand(self, ref: Ref, like: tuple[int, ...] = ()) -> tuple[At, tuple[int, ...], int]:
        """Place, strides and dtype code of an elementwise operand, a constant laid out like strides are."""
        constant = self.constant(ref)
        if constant is not None:
            dense = constant
            for d, stride in enumerate(ref.stride):
                dense = dense.narrow(d, 0, 1) if stride == 0 and dense.shape[d] > 1 else dense
            order = list(range(dense.ndim))
            if len(like) == dense.ndim:
                order.sort(key=lambda d: -like[d])
            laid = dense.permute(order)
            strides = dict(zip(order, laid.contiguous().stride(), strict=True))
            broadcast = tuple(0 if n == 1 else strides[d] for d, n in enumerate(dense.shape))
            return self.constants.add(("dense", ref, *order), laid, dense), broadcast, 0
        at = self.stored(ref)
        value = self.values[ref.storage]
        assert isinstance(value, Stored)
        wide = value.element_size == 4 and isinstance(value.at.where, Buffer)
        return at, ref.stride, 0 if wide else self.code(ref.dtype)

    def copies_from(self, dtype: torch.dtype) -> bool:
        """Whether elementwise steps read a dtype."""
        return dtype in steps.DTYPES

    def code(self, dtype: torch.dtype) -> int:
        """The number of a dtype in elementwise steps."""
        return steps.DTYPES[dtype]

    def image(self, pixels: Pixels) -> Image:
        """Pixels in memory as an operand of a step."""
        constant = self.constant(pixels.ref)
        if constant is None:
            place, row, y, x = self.stored(pixels.ref), pixels.row, pixels.y, pixels.x
            if not self.is_wide(pixels.ref):
                raise NotLowerable(f"an image of {pixels.ref.dtype}")
        else:
            dense = constant.as_strided(
                (pixels.rows, pixels.height, pixels.width, pixels.channels),
                (pixels.row, pixels.y, pixels.x, 1),
                pixels.ref.offset,
            )
            place = self.kept(dense, ("image", pixels))
            row, y, x = (n * pixels.channels for n in (pixels.height * pixels.width, pixels.width, 1))
        return Image(place, row, y, x, pixels.channels, pixels.rows)

    def is_wide(self, ref: Ref) -> bool:
        """Whether a value is held in float32."""
        value = self.values.get(ref.storage)
        inside = not isinstance(value, Stored) or isinstance(value.at.where, Buffer)
        return ref.dtype == torch.float32 or (inside and ref.dtype == torch.bfloat16)

    # Reading

    def source(self, pixels: Pixels) -> Source:
        """How a step can read these pixels: from memory, or computed on the way."""
        value = self.values.get(pixels.ref.storage)
        if value is None or isinstance(value, Stored | Convolved | Expression | Padded | Scores):
            return Source([pixels])
        if not value.pixels.same_place(pixels):
            self.stored(pixels.ref)
            return Source([pixels])
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
            return Source([pixels])
        return found

    def _on_the_way(self, value: Activated | Dropped | Normed | Joined | Enlarged, pixels: Pixels) -> Source | None:
        """The source that computes a value while it is read, none where what it reads is not simple enough."""
        height, width = pixels.height, pixels.width
        if isinstance(value, Joined):
            parts = [self._inner(part, height, width) for part in value.parts]
            if any(part is None or part != Source(part.images) or len(part.images) != 1 for part in parts):
                return None
            return Source([part.images[0] for part in parts if part is not None])
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
        if inner.activation is not Activation.NONE:
            return None
        if isinstance(value, Activated):
            return dataclasses.replace(inner, activation=value.activation)
        return None if inner.tables is not None else dataclasses.replace(inner, tables=self.tables(value))

    def _inner(self, pixels: Pixels, height: int, width: int) -> Source | None:
        reshaped = pixels.reshaped(height, width)
        return None if reshaped is None else self.source(reshaped)

    def plain(self, pixels: Pixels) -> Source:
        """The same without normalisation, activation, mask and enlargement, which are computed first."""
        source = self.source(pixels)
        if source == Source(source.images):
            return source
        self.stored(pixels.ref)
        return Source([pixels])

    def tables(self, value: Normed) -> tuple[At, At]:
        """Scale and shift of a normalisation, [R, C] each, by a step that is added when they are first asked for."""
        if value.tables is None:
            source = self.plain(value.inner)
            rows, channels = value.pixels.rows, value.pixels.channels
            value.tables = (At(self.buffer(rows * channels)), At(self.buffer(rows * channels)))
            pixels = source.images[0]
            pair = self.pair(source)
            size = channels // value.groups
            splits = 1
            if rows * 2 <= 2 * self.num_threads + 1 and channels >= 64 and size >= 8:
                splits = min(2, value.groups)
            scale, shift = value.row_scale or (None, 0), value.row_shift or (None, 0)
            self.add(
                steps.Norm(
                    rows,
                    value.runs.rows,
                    splits,
                    pair,
                    pixels.height,
                    pixels.width,
                    value.groups,
                    or_none(value.weight),
                    or_none(value.bias),
                    or_none(scale[0]),
                    scale[1],
                    or_none(shift[0]),
                    shift[1],
                    value.eps,
                    *value.tables,
                    or_none(value.runs.members),
                    tasks=rows * splits,
                )
            )
        return value.tables

    def pair(self, source: Source) -> tuple[Image, Image]:
        """The images of a source as the two operands of a step."""
        images = [self.image(pixels) for pixels in source.images]
        return images[0], images[1] if len(images) == 2 else Image()

    # Writing

    def store(self, storage: int) -> None:
        """Compute a value into memory now, if that was not done yet."""
        self._store(storage, self.values[storage])

    def add(self, step: Step | Call) -> None:
        """Append a step."""
        self.steps.append(step)

    def _store(self, storage: int, value: Value) -> Stored:
        if isinstance(value, Stored):
            return value
        if isinstance(value, Scores):
            value.compute()
            return self._store(storage, self.values[storage])
        ref = value.ref if isinstance(value, Expression) else value.pixels.ref
        place = Stored(At(self.buffer(ref.span, ref.dtype)))
        self._write(value, place.at)
        self.values[storage] = place
        return place

    def _write(self, value: Value, at: At) -> None:
        if isinstance(value, Expression):
            self.expression(value.root, value.ref.size, at, value.ref.stride, 0)
        elif isinstance(value, Convolved):
            convolution(self, value, at)
        elif isinstance(value, Padded):
            padded(self, value, at)
        elif isinstance(value, Activated | Dropped | Normed | Joined | Enlarged):
            self._copied(value, at)

    def _copied(self, value: Activated | Dropped | Normed | Joined | Enlarged, at: At) -> None:
        copied(self, value, at)

    def pointwise(
        self, sizes: list[int], out: Strided, inputs: list[Strided], code: list[tuple[Opcode, int, int, float]]
    ) -> None:
        """Append an elementwise step, its runs split where there are too few of them for the threads."""
        sizes, strides = simplified(sizes, [out.strides, *(x.strides for x in inputs)])
        numel = 1
        for n in sizes:
            numel *= n
        if numel == 0:
            return
        operands = [dataclasses.replace(x, strides=s) for x, s in zip((out, *inputs), strides, strict=True)]
        runs = numel // sizes[-1]
        tasks = max(1, min(runs, numel // _POINTWISE_GRAIN, 4 * self.num_threads))
        words: list[int | float] = []
        for opcode, a, b, number in code + [(Opcode.COPY, 0, 0, 0.0)] * (steps.MAX_INSTRUCTIONS - len(code)):
            words += [int(opcode) | a << 16 | b << 32, float(number)]
        padding = [Strided() for _ in range(steps.MAX_INPUTS - len(inputs))]
        self.add(
            steps.Pointwise(sizes, operands[0], len(inputs), operands[1:] + padding, len(code), words, tasks=tasks)
        )

    def expression(
        self, root: Leaf | Apply, size: tuple[int, ...], at: At, stride: tuple[int, ...], dtype: int
    ) -> None:
        """Append the steps that compute an expression into a strided place."""
        leaves, code = instructions(root)
        inputs = []
        for leaf in leaves:
            place, strides, code_of = self.operand(leaf.ref, stride)
            missing = len(size) - len(strides)
            aligned = [0] * missing + [0 if n == 1 else s for n, s in zip(leaf.ref.size, strides, strict=True)]
            inputs.append(Strided(place, code_of, aligned))
        self.pointwise(list(size), Strided(at, dtype, list(stride)), inputs, code)
