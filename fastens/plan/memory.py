"""Where the values of a program are: buffers in the arena that share memory when their lives do not overlap."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastens.program.steps import NONE, Slot, address

ALIGNMENT = 64  # bytes: a cache line, and a vector
HALVES = (torch.bfloat16, torch.float16)


def address_unit(dtype: torch.dtype) -> int:
    """How many bytes one element takes in the addresses of the arena, where half precision is held in float32."""
    return 4 if dtype in HALVES else dtype.itemsize


@dataclasses.dataclass(eq=False)
class Buffer:
    """A piece of the arena, from the first to the last step that touches it."""

    num_bytes: int
    first: int = -1
    last: int = -1
    offset: int = -1
    dtype: torch.dtype = torch.float32

    def touch(self, step: int) -> None:
        """Keep the buffer alive for a step."""
        self.first = step if self.first < 0 else self.first
        self.last = max(self.last, step)


@dataclasses.dataclass(frozen=True)
class Argument:
    """An input of the call or, behind the inputs, one of its outputs."""

    number: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the inputs, in its logical order; one with the same key is the same.

    Attributes:
        key: what tells it from others; it may hold the identity of a storage.
        tensor: the values.
        source: the tensor that they come from, which is kept alive, so that its identity stays its own; none for one
            that was made for this.
    """

    key: object
    tensor: Tensor = dataclasses.field(compare=False, repr=False)
    source: Tensor | None = dataclasses.field(compare=False, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.tensor.dtype


@dataclasses.dataclass(frozen=True)
class Cast:
    """A buffer or an argument whose bytes are read as another dtype, in whose elements views of it count."""

    where: Buffer | Argument
    dtype: torch.dtype


Memory = Buffer | Argument | Cast


@dataclasses.dataclass(frozen=True)
class At:
    """A place in a program: bytes from the start of a buffer or of a slot."""

    where: Buffer | int
    num_bytes: int = 0

    def plus(self, elements: int, size: int = 4) -> At:
        """The place some elements further."""
        return At(self.where, self.num_bytes + elements * size)

    def word(self) -> int:
        """The address, once the buffers are laid out."""
        if isinstance(self.where, Buffer):
            return address(Slot.ARENA, self.where.offset + self.num_bytes)
        return address(self.where, self.num_bytes)


def or_none(at: At | None) -> Any:
    """A place as a word of a step, which says where it is absent."""
    return NONE if at is None else at


def lay_out(buffers: list[Buffer]) -> int:
    """Give every buffer its offset; return the bytes of the arena.

    Buffers are placed in the order of their sizes, each at the lowest offset that is free during its life.
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted((b for b in buffers if b.first >= 0), key=lambda b: -b.num_bytes):
        alive = sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset)
        offset = 0
        for other in alive:
            if offset + buffer.num_bytes <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.num_bytes) // ALIGNMENT) * ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + buffer.num_bytes)
    return total


class Constants:
    """The packed weights and other constants of an ensemble's programs, in one tensor that only grows.

    Args:
        capacity: float32 values that there is room for once there are any; what is not written costs no memory.

    Attributes:
        memory: the values, float32 [n].
    """

    def __init__(self, capacity: int = 0) -> None:
        self._known: dict[object, tuple[At, Tensor]] = {}
        self._elements = 0
        self._capacity = capacity
        self._lock = threading.Lock()  # several threads may record plans
        self.memory = torch.empty(0)

    def add(self, key: object, values: Tensor, source: Tensor | None = None) -> At:
        """Keep float32 values under a key; return where they are.

        Args:
            key: what tells the values from others; it may hold the identity of a storage.
            values: the values, in their logical order.
            source: the tensor that they come from; it is kept alive, so that its identity stays its own.
        """
        keep = values if source is None else source
        return self.write(key, values.numel(), lambda into: into.view(values.shape).copy_(values.detach()), keep)

    def write(self, key: object, size: int, fill: Callable[[Tensor], object], source: Tensor) -> At:
        """The place of a constant of ``size`` values, which ``fill`` writes into a flat tensor if ``key`` is new."""
        with self._lock:
            found = self._known.get(key)
            if found is None:
                start = self._elements
                self._elements += size + -size % (ALIGNMENT // 4)
                if self._elements > len(self.memory):
                    grown = torch.empty(max(2 * self._elements, self._capacity))
                    grown[:start].copy_(self.memory[:start])
                    self.memory = grown
                fill(self.memory[start : start + size])
                found = self._known[key] = (At(Slot.WEIGHTS, start * 4), source)
            return found[0]

    @property
    def num_bytes(self) -> int:
        """Memory of the values, not counting the tensors that they come from."""
        return 4 * self._elements


class KeptTensors:
    """Constants of launches, where they are: what is contiguous is not copied."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Tensor, Tensor | None]] = {}
        self._joined: dict[object, tuple[Tensor, list[Tensor]]] = {}

    def add(self, constant: Constant) -> Tensor:
        """Keep a constant; return it contiguous."""
        if constant not in self._known:
            self._known[constant] = (constant.tensor.detach().contiguous(), constant.source)
        return self._known[constant][0]

    def stack(self, weight: Constant) -> Tensor:
        """Keep a convolution's weights, which its kernels read in any layout."""
        key = ("stack", weight)
        if key not in self._known:
            self._known[key] = (weight.tensor.detach(), weight.source)
        return self._known[key][0]

    def joined(self, stacks: list[Tensor]) -> Tensor:
        """Keep stacks [K, O_i, ...] of several layers as one [K, sum O_i, ...], which is a copy."""
        key = tuple((stack.data_ptr(), stack.shape, stack.stride(), stack.dtype) for stack in stacks)
        if key not in self._joined:
            self._joined[key] = (torch.cat(stacks, 1), stacks)  # the parts live on, so that nothing takes their place
        return self._joined[key][0]

    @property
    def num_bytes(self) -> int:
        """Memory of what had to be copied."""
        copied = sum(tensor.nbytes for tensor, _ in self._joined.values())
        return copied + sum(t.nbytes for t, s in self._known.values() if s is None or t.data_ptr() != s.data_ptr())
