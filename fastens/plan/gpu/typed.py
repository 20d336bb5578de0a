"""Emitting the same steps for launches: weights stay the ensemble's stacks, and buffers hold the recorded dtypes."""

from __future__ import annotations

import dataclasses

import torch

from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.values import Activated, Convolved, Dropped, Enlarged, Joined, Normed
from fastens.plan.memory import At
from fastens.program import steps
from fastens.program.steps import Image
from fastens.trace.record import Ref


@dataclasses.dataclass
class Normalised(steps.Step):
    """A whole group normalisation and activation into memory, for what does not normalise as it reads."""

    kind = -1  # of no program
    table_scale: int
    sources: tuple[Image, Image]
    up: int
    height: int
    width: int
    act_in: int
    out: Image


class TypedEmitter(Emitter):
    """See the module; ``constants`` is a :class:`fastens.plan.memory.KeptTensors`."""

    floats = (torch.float32, torch.bfloat16, torch.float16)
    typed = True

    def copies_from(self, dtype: torch.dtype) -> bool:
        """Whether elementwise launches read a dtype."""
        return dtype in steps.DTYPES or dtype in self.floats

    def code(self, dtype: torch.dtype) -> int:
        """Always 0: launches read tensors, which have dtypes of their own."""
        return 0

    def is_wide(self, ref: Ref) -> bool:
        """Whether a value is held in the dtype that it was recorded in: always."""
        return ref.dtype.is_floating_point

    def packed(self, value: Convolved, vectors: int, pairs: bool, squares: int) -> At:
        """The place of a convolution's weights, stacked [K, ...] and not packed: kernels read torch's layout."""
        return self.constants.stack(("stack", value.key), value.weight)

    def _copied(self, value: Activated | Dropped | Normed | Joined | Enlarged, at: At) -> None:
        source = self.source(value.pixels)
        if source.tables is None or source.mask is not None:
            super()._copied(value, at)
            return
        p = value.pixels
        out = Image(at, p.row, p.y, p.x, p.channels, p.rows)
        pair, activation = self.pair(source), int(source.activation)
        self.add(Normalised(source.tables[0], pair, source.factor, p.height, p.width, activation, out))
