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
from fastens.plan.cpu.emit import Emitter
from fastens.plan.cpu.exact import is_exact
from fastens.plan.graph import TorchCall, View
from fastens.plan.lowering.lower import lower_all
from fastens.plan.lowering.target import Target
from fastens.plan.memory import HALVES, Argument, At, Buffer, Cast, Constants, lay_out
from fastens.plan.torch_call import call
from fastens.program import steps
from fastens.program.steps import Step
from fastens.trace.record import NotLowerable, Recording, mapped

_PRODUCTS, _BYTES = 100e3, 8e3  # multiply-adds and bytes of one thread in a microsecond, about
_WORTH_WAKING = 80  # microseconds of work: less is done before a sleeping thread takes its share


# a step computes in float32, whatever dtype a buffer was recorded in; it reads doubles and whole numbers too
TARGET = Target(
    floats=(torch.float32, torch.bfloat16),
    copied=tuple(steps.DTYPES),
    read_in_buffers=(torch.float32, torch.bfloat16),
    read_in_arguments=(torch.float32,),
    widens=True,
    tables=True,
    mask_lanes=steps.LANES,
    divides=True,
    fills=True,
    copies_all=False,
    exact_log=False,  # embeddings multiply log(sigma) by 100 to 1000, and with it what its last bit is off
    shared_heads=True,
)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A view of an input of the call, or one of its outputs, by its number."""

    number: int
    view: View
    whole: bool

    def read(self, given: list[Tensor]) -> Tensor:
        view, dtype, x = self.view, self.view.dtype, given[self.number]
        if self.whole:
            return x
        start, rest = divmod(x.storage_offset() * x.itemsize, dtype.itemsize)
        if rest and x.numel():  # where no element of that dtype begins: of a copy
            span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            x, start = x.as_strided((span,), (1,)).clone(), 0
        return torch.empty(0, dtype=dtype).set_(x.untyped_storage(), start + view.offset, view.size, view.stride)


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
        self._in_place = [x for x in self.outs if isinstance(x, Tensor)]  # all of them, unless some are late

    def run(self, given: list[Tensor]) -> None:
        args, kwargs, outs = self.args, self.kwargs, self._in_place
        if self._late:
            args, kwargs = mapped(_Given | _Wide, lambda x: x.read(given), (args, kwargs))
            wide = (x.view if isinstance(x, _Wide) else x for x in self.outs)
            outs = [x.read(given) if isinstance(x, _Given) else x for x in wide]
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
        self._inputs = recording.inputs
        self._constants = constants
        builder, outputs = lower_all(recording, num_members, TARGET)
        self._outputs = [(ref.size, ref.dtype) for ref in outputs]
        other = next((n for n in builder.nodes if exact and isinstance(n, TorchCall) and not is_exact(n)), None)
        if other is not None:
            raise NotLowerable(f"{other.func} is torch's, whose last bits depend on batch and threads")
        emitter = Emitter(constants, num_threads, exact)
        for node in builder.nodes:
            emitter.emit(node)
        self._assemble(emitter.steps, builder.buffers)

    def _assemble(self, program: list[Step | TorchCall], buffers: list[Buffer]) -> None:
        for i, step in enumerate(program):
            touched: list[Buffer] = []
            _buffers(step, touched)
            for buffer in touched:
                buffer.touch(i)
        num_bytes = lay_out(buffers)
        self._arena = torch.empty(num_bytes // 16 * 4 + 16)  # whole elements of any dtype
        self.steps = program
        self.stretches: list[tuple[Tensor, int] | _Call] = []
        stretch: list[Step] = []
        for step in program:
            if isinstance(step, TorchCall):
                self._add(stretch)
                stretch = []
                args, kwargs, outs = mapped(View, self._bound, (step.args, step.kwargs, step.outs))
                self.stretches.append(_Call(step.func, args, kwargs, outs))
            else:
                stretch.append(step)
        self._add(stretch)
        self._lock = threading.Lock()

    def _add(self, stretch: list[Step]) -> None:
        if stretch:
            num_threads = self.num_threads if sum(map(_expected, stretch)) > _WORTH_WAKING else 1
            self.stretches.append((steps.encode(stretch), num_threads))

    def _bound(self, view: View) -> Tensor | _Given | _Wide:
        where, dtype = view.where, view.dtype
        buffer = where.where if isinstance(where, Cast) else where
        if not isinstance(buffer, Buffer):
            return _Given(buffer.number, view, self._is_whole(buffer, view))
        held = torch.float32 if dtype in HALVES and where is buffer else dtype
        found = self._arena.view(held).as_strided(view.size, view.stride, buffer.offset // held.itemsize + view.offset)
        return found if held is dtype else _Wide(found, dtype)

    def _is_whole(self, argument: Argument, view: View) -> bool:
        """Whether a view is an argument as it is given; outputs always are."""
        if argument.number >= len(self._inputs):
            return True
        x = self._inputs[argument.number]
        return not view.offset and (view.size, view.stride, view.dtype) == (x.size, x.stride, x.dtype)

    @property
    def num_bytes(self) -> int:
        """Memory of the arena."""
        return 4 * self._arena.numel()

    @property
    def kinds(self) -> dict[str, int]:
        """How many steps of each kind, and calls of torch by name."""
        return Counter(s.name if isinstance(s, TorchCall) else type(s).__name__ for s in self.steps)

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
    if isinstance(value, TorchCall):
        for view in (*value.reads(), *value.writes()):
            where = view.where.where if isinstance(view.where, Cast) else view.where
            if isinstance(where, Buffer):
                into.append(where)
    elif isinstance(value, At):
        if isinstance(value.where, Buffer):
            into.append(value.where)
    elif not isinstance(value, int | float):
        for item in value if isinstance(value, list | tuple) else vars(value).values():
            _buffers(item, into)
