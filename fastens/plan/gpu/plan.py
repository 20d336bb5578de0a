"""A plan for a GPU: the nodes of a folded pass as a flat list of calls on tensors that were laid out beforehand.

The graph is lowered as for a CPU; :mod:`fastens.plan.gpu.legalize` turns its nodes into those that kernels take, and
:mod:`fastens.plan.gpu.pipeline` makes few of many. A residual block is two convolutions: a group norm becomes moments
that the convolution before it takes of its own result, and scale, shift and activation that the convolution behind it
applies as it reads.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastens.device import copy_given, device_of
from fastens.kernels._graph import keep
from fastens.ops.conv2d_sum import sums
from fastens.plan.gpu import calls as run
from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.launch import Conv, Entry, arguments_of, function_of
from fastens.plan.gpu.legalize import TARGET, Legalizer
from fastens.plan.gpu.pipeline import rewrite
from fastens.plan.gpu.replay import Replays
from fastens.plan.graph import Node, View
from fastens.plan.lowering.lower import lower_all
from fastens.plan.memory import Buffer, Constant, KeptTensors, lay_out
from fastens.trace.functionalize import contiguous
from fastens.trace.record import Recording, mapped


@dataclasses.dataclass
class _Bound:
    """Launches with the tensors that they read and write."""

    inputs: list[tuple[int, Tensor]]
    outputs: list[tuple[Tensor, torch.dtype]]
    launches: list[tuple[Node, dict[str, Any]]]

    def read(self, given: list[Tensor]) -> None:
        """Copy what the launches read of a call to where they read it."""
        for number, static in self.inputs:
            copy_given(static, given[number])

    def launch(self, last: int | None, weights: list[float] | None) -> list[Tensor]:
        """Run all launches, and return the outputs of the pass.

        With weights, launch ``last`` sums its members by them instead of writing each, and only the sum is returned.
        """
        summed = None if weights is None else last
        for i, (launch, operands) in enumerate(self.launches):
            if i != summed:
                function_of(launch)(**operands)
        if summed is None or weights is None:
            return [x for x, _ in self.outputs]
        _, operands = self.launches[summed]
        return [run.conv2d_sum(weights, operands["block"], operands["backend"])]

    def copies(self, results: list[Tensor]) -> list[Tensor]:
        """The results in memory of their own, and of the dtypes of the pass."""
        dtypes = [dtype for _, dtype in self.outputs]
        return [torch.empty(x.shape, dtype=t, device=x.device).copy_(x) for x, t in zip(results, dtypes, strict=True)]


class LaunchPlan:
    """The launches of a folded pass, and their memory.

    Args:
        recording: of the pass.
        num_members: K.
        constants: the ensemble's stacks and what is derived from them.
        device: where it runs.
        backend: the code that runs it: ``"auto"``, ``"triton"`` or ``"reference"``.
    """

    def __init__(
        self, recording: Recording, num_members: int, constants: KeptTensors, device: torch.device, backend: str
    ) -> None:
        self._num_members = num_members
        self._constants = constants
        self._backend = backend
        builder, results = lower_all(recording, num_members, TARGET)
        self._inputs = list(recording.inputs)
        self._dtypes = [ref.dtype for ref in results]
        self._device = device
        places = builder.arguments[len(self._inputs) :]
        outputs = [View(place, 0, ref.size, contiguous(ref.size)) for place, ref in zip(places, results, strict=True)]
        legal = Legalizer(builder, constants, device).nodes
        flow = Dataflow(legal, outputs, self._inputs, constants, builder.buffer)
        rewrite(flow)
        self._launches, self._outputs = flow.nodes, flow.outputs.views
        self._slots = {view.where: (view.size, dtype) for view, dtype in zip(outputs, self._dtypes, strict=True)}
        self._last = self._summable(flow)
        self.sums = self._last is not None
        for i, launch in enumerate((*self._launches, flow.outputs)):
            for view in (*launch.writes(), *launch.reads()):
                if isinstance(view.where, Buffer):
                    view.where.touch(i)
        self.num_bytes = max(64, lay_out(builder.buffers))
        self._lock = threading.Lock()
        self._bound = self._bind()
        self._on = device_of(device)
        self._turns = self._on.turns()
        self.replays = Replays(device, self.num_bytes)

    @property
    def kinds(self) -> dict[str, int]:
        """How many launches of each kind, and calls of torch by name."""
        return Counter(launch.name for launch in self._launches)

    @property
    def ways(self) -> dict[str, int]:
        """How many convolutions run in each way, as far as the choices have been made."""
        bound = [operands for launch, operands in self._bound.launches if isinstance(launch, Conv)]
        return Counter(run.conv2d_way(**operands) or "not measured yet" for operands in bound)

    def _summable(self, flow: Dataflow) -> int | None:
        """The number of the convolution that makes the only output, where it may sum over the members."""
        source, *others = self._outputs
        last = flow.writer(source)
        if others or not isinstance(last, Conv) or len(flow.readers(source)) != 1:
            return None
        out, block = last.out, last.block
        whole = source.size == out.size and source.same_image(out) and self._dtypes == [out.dtype]
        space = zip(block.x.size[2:], block.weight.shape[3:], block.stride, block.padding, strict=True)
        symmetric = tuple((n + 2 * p - taps) // s + 1 for n, taps, s, p in space) == tuple(out.size[2:])
        plain = sums(block) and last.moments is None and len(block.weight) == self._num_members
        plain = plain and not block.prologue.norm_groups
        is_last = last is flow.nodes[-1]  # a sum is run behind all others, which may have the memory of its inputs
        return flow.position(last) if whole and symmetric and plain and is_last else None

    def _bind(self) -> _Bound:
        """The launches in memory of their own."""
        arena = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        slots: dict[Any, tuple[Tensor, int]] = {}

        def slot(where: Any) -> Tensor:
            if where not in slots:
                number: int = where.number
                if where in self._slots:
                    size, dtype = self._slots[where]
                    made = torch.empty(size, dtype=dtype, device=self._device)
                else:
                    ref = where if isinstance(where, Entry) else self._inputs[number]
                    span = 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True))
                    made = torch.empty(max(1, span), dtype=ref.dtype, device=self._device)
                    made = made.as_strided(ref.size, ref.stride)
                slots[where] = (made, number)
            return slots[where][0]

        def tensor(view: View) -> Tensor:
            where, start = view.where, view.offset
            if isinstance(where, Buffer):
                whole, start = arena.view(where.dtype), start + where.offset // where.dtype.itemsize
            elif isinstance(where, Constant):
                whole = self._constants.add(where)
                start += whole.storage_offset()
            else:
                whole = slot(where)
            return whole.as_strided(view.size, view.stride, start)

        launches = [(node, mapped(View, tensor, arguments_of(node, self._backend))) for node in self._launches]
        outputs = list(zip(map(tensor, self._outputs), self._dtypes, strict=True))
        inputs = [(number, made) for where, (made, number) in slots.items() if where not in self._slots]
        return _Bound(inputs, outputs, launches)

    def run(self, inputs: list[Tensor], weights: list[float] | None = None) -> list[Tensor]:
        """Run the launches.

        From the fifth run on a CUDA graph replays them. While a graph of the caller's is recorded they are bound to
        memory of that graph's own, so that its replays may run beside calls.

        Args:
            inputs: tensors of the shapes, strides and dtypes of the recording, on any device.
            weights: K numbers by which the members are summed, where the plan ``sums``; none for each member's output.

        Returns:
            The outputs of the pass, in memory of their own.
        """
        last = None if weights is None else self._last
        if self._on.capturing():
            keep(self._launches)  # they hold the constants; what is bound to them is memory of the graph
            bound = self._bind()
            bound.read(inputs)
            results = bound.launch(last, weights)
            return bound.copies(results) if last is None else results
        with self._lock, self._turns:
            self._bound.read(inputs)
            kind = None if last is None or weights is None else tuple(weights)
            results, kept = self.replays.run(kind, lambda: self._bound.launch(last, weights))
            return self._bound.copies(results) if kept or last is None else results
