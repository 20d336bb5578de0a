"""A plan: the program of one folded pass, with its memory, ready to be run again on other inputs."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.ops.run_program import run_program
from fastens.plan.cpu.exact import is_exact
from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.lower import lower_all
from fastens.plan.lowering.registry import constants_of
from fastens.plan.memory import At, Buffer, Constants, lay_out
from fastens.plan.torch_call import Call, call
from fastens.program import steps
from fastens.program.steps import Slot, Step
from fastens.trace.record import NotLowerable, Recording, Ref, mapped

_PRODUCTS, _BYTES = 100e3, 8e3  # multiply-adds and bytes of one thread in a microsecond, about
_HALF = (torch.bfloat16, torch.float16)
_WORTH_WAKING = 80  # microseconds of work: less is done before a sleeping thread takes its share


@dataclasses.dataclass(frozen=True)
class _Given:
    """A view of an input of the call, or one of its outputs."""

    number: int
    ref: Ref
    num_bytes: int  # from its first element
    whole: bool

    def read(self, given: list[Tensor]) -> Tensor:
        x, ref = given[self.number], self.ref
        if self.whole:
            return x
        start = (x.storage_offset() * x.itemsize + self.num_bytes) // ref.dtype.itemsize
        return torch.empty(0, dtype=ref.dtype).set_(x.untyped_storage(), start, ref.size, ref.stride)


@dataclasses.dataclass(frozen=True)
class _Wide:
    """A value of half precision, which the arena holds in float32."""

    view: Tensor
    dtype: torch.dtype

    def read(self, _: list[Tensor]) -> Tensor:
        return self.view.to(self.dtype)


@dataclasses.dataclass
class _Call:
    """A call of torch, with the views of the arena and of the inputs that it reads, and those that it writes."""

    func: Any
    args: Any
    kwargs: Any
    outs: list[Tensor | _Given | _Wide]

    def __post_init__(self) -> None:
        leaves = pytree.tree_leaves((self.args, self.kwargs, self.outs))
        self._late = any(isinstance(leaf, _Given | _Wide) for leaf in leaves)
        self._exact = not any(isinstance(x, _Wide) for x in self.outs)

    def run(self, given: list[Tensor]) -> None:
        args, kwargs, outs = self.args, self.kwargs, self.outs
        if self._late:
            args, kwargs = mapped(_Given | _Wide, lambda x: x.read(given), (args, kwargs))
            outs = [x.view if isinstance(x, _Wide) else x.read(given) if isinstance(x, _Given) else x for x in outs]
        call(outs, self.func, args, kwargs, self._exact)


class Plan:
    """The program of a folded pass.

    Args:
        recording: of the pass.
        num_members: K.
        constants: the packed weights of the ensemble, which this plan adds its own to.
        num_threads: that share the steps.
        exact: whether a row's bits shall not depend on how many rows and threads there are.

    Raises:
        NotLowerable: a form that no plan has; a plan that shall be exact, and calls torch for what is not.

    Attributes:
        stretches: encoded steps with the number of threads that share them, and calls of torch between them.
        steps: what they came from.
    """

    sums = False  # over the members, in its last layer; see fastens.plan.gpu.plan

    def __init__(
        self, recording: Recording, num_members: int, constants: Constants, num_threads: int, exact: bool = False
    ) -> None:
        self.num_threads = num_threads
        emitter = Emitter(recording, num_members, num_threads, constants, exact)
        self._outputs = [(ref.size, ref.dtype) for ref in lower_all(emitter)]
        other = next((s for s in emitter.steps if exact and isinstance(s, Call) and not is_exact(s)), None)
        if other is not None:
            raise NotLowerable(f"{other.func} is torch's, whose last bits depend on batch and threads")
        self._assemble(emitter)

    def _assemble(self, emitter: Emitter) -> None:
        for i, step in enumerate(emitter.steps):
            touched: list[Buffer] = []
            _buffers(step, touched)
            for buffer in touched:
                buffer.touch(i)
        num_bytes = lay_out(emitter.buffers)
        self._arena = torch.empty(num_bytes // 16 * 4 + 16)  # whole elements of any dtype
        self._constants = emitter.constants
        self.steps = emitter.steps
        self.stretches: list[tuple[Tensor, int] | _Call] = []
        stretch: list[Step] = []
        for step in emitter.steps:
            if isinstance(step, Call):
                self._add(stretch)
                stretch = []
                self.stretches.append(self._bound(emitter, step))
            else:
                stretch.append(step)
        self._add(stretch)
        self._lock = threading.Lock()

    def _add(self, stretch: list[Step]) -> None:
        if stretch:
            num_threads = self.num_threads if sum(map(_expected, stretch)) > _WORTH_WAKING else 1
            self.stretches.append((steps.encode(stretch), num_threads))

    def _bound(self, emitter: Emitter, step: Call) -> _Call:
        def view(leaf: Ref) -> Tensor | _Given | _Wide:
            at = step.places[leaf]
            if not isinstance(at.where, Buffer):
                return self._given(emitter, at, leaf)
            held = torch.float32 if leaf.dtype in _HALF else leaf.dtype
            start = (at.where.offset + at.num_bytes) // held.itemsize
            found = self._arena.view(held).as_strided(leaf.size, leaf.stride, start)
            return found if held is leaf.dtype else _Wide(found, leaf.dtype)

        args, kwargs = constants_of(emitter, (step.args, step.kwargs))
        args, kwargs = mapped(Ref, view, (args, kwargs))
        return _Call(step.func, args, kwargs, [view(out) for out in step.outs])

    @staticmethod
    def _given(emitter: Emitter, at: At, leaf: Ref) -> _Given:
        number = int(at.where) - Slot.ARGUMENTS
        if number >= len(emitter.recording.inputs):
            return _Given(number, leaf, 0, True)
        x = emitter.recording.inputs[number]
        whole = at.num_bytes == 0 and (leaf.size, leaf.stride, leaf.dtype) == (x.size, x.stride, x.dtype)
        return _Given(number, leaf, at.num_bytes, whole)

    @property
    def num_bytes(self) -> int:
        """Memory of the arena."""
        return 4 * self._arena.numel()

    @property
    def kinds(self) -> dict[str, int]:
        """How many steps of each kind, and calls of torch by name."""
        return Counter(str(s.func) if isinstance(s, Call) else type(s).__name__ for s in self.steps)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the program.

        Args:
            inputs: tensors of the shapes, strides and dtypes of the recording.

        Returns:
            The outputs of the pass, in memory of their own.
        """
        outputs = [torch.empty(size, dtype=dtype) for size, dtype in self._outputs]
        weights = self._constants.memory
        with self._lock:
            for stretch in self.stretches:
                if isinstance(stretch, _Call):
                    stretch.run([*inputs, *outputs])
                else:
                    run_program(stretch[0], weights, self._arena, inputs, outputs, stretch[1])
        return outputs


def _expected(step: Step) -> float:
    """Microseconds that a step takes one thread, as far as products and memory tell."""
    touched: list[Buffer] = []
    _buffers(step, touched)
    products, num_bytes = 0, sum(buffer.num_bytes for buffer in touched)
    if isinstance(step, steps.Conv):
        channels = sum(source.channels for source in step.sources)
        kernel = step.kernel_h * step.kernel_w * channels * step.out_channels
        products = step.rows * step.out_h * step.out_w * kernel
        num_bytes += 4 * kernel * -(-step.rows // step.rows_per_member)
    return products / _PRODUCTS + num_bytes / _BYTES


def _buffers(value: Any, into: list[Buffer]) -> None:
    if isinstance(value, int | float):
        return
    if isinstance(value, At):
        if isinstance(value.where, Buffer):
            into.append(value.where)
    elif isinstance(value, Call):
        _buffers(list(value.places.values()), into)
    else:
        for item in value if isinstance(value, list | tuple) else vars(value).values():
            _buffers(item, into)
