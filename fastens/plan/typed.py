"""Emitting the same steps for launches: weights stay the ensemble's stacks, and buffers hold the recorded dtypes."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fastens.plan.emit import Emitter
from fastens.plan.memory import At, Kept
from fastens.plan.record import Ref
from fastens.plan.values import Activated, Convolved, Dropped, Enlarged, Joined, Normed
from fastens.program import steps
from fastens.program.steps import Image


class KeptTensors:
    """Constants of launches, where they are: what is contiguous is not copied."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[At, Tensor | None]] = {}

    def add(self, key: object, values: Tensor, source: Tensor | None = None) -> At:
        """Keep a tensor, in its logical order, under a key; ``source`` is kept alive beside it."""
        if key not in self._known:
            self._known[key] = (At(Kept(values.detach().contiguous())), source)
        return self._known[key][0]

    def stack(self, key: object, weight: Tensor) -> At:
        """Keep a convolution's weights, which its kernels read in any layout."""
        if key not in self._known:
            self._known[key] = (At(Kept(weight.detach())), weight)
        return self._known[key][0]

    @property
    def num_bytes(self) -> int:
        """Memory of what had to be copied."""
        tensors = ((at.where.tensor, source) for at, source in self._known.values() if isinstance(at.where, Kept))
        return sum(t.nbytes for t, s in tensors if s is None or t.data_ptr() != s.data_ptr())


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
    """See the module; ``constants`` is a :class:`KeptTensors`."""

    typed = True

    def is_wide(self, ref: Ref) -> bool:
        """Whether a value is held in the dtype that it was recorded in: always."""
        return ref.dtype.is_floating_point

    def packed(self, value: Convolved, vectors: int, pairs: bool, squares: int) -> At:
        """Where the stack of a convolution's weights is."""
        return self.constants.stack(("stack", value.key), value.weight)  # pyright: ignore[reportAttributeAccessIssue]

    def _copied(self, value: Activated | Dropped | Normed | Joined | Enlarged, at: At) -> None:
        source = self.source(value.pixels)
        if source.tables is None:
            super()._copied(value, at)
            return
        p = value.pixels
        out = Image(at, p.row, p.y, p.x, p.channels, p.rows)  # pyright: ignore[reportArgumentType]
        pair, activation = self.pair(source), int(source.activation)
        self.add(Normalised(source.tables[0], pair, source.factor, p.height, p.width, activation, out))  # pyright: ignore[reportArgumentType]
