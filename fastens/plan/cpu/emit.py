"""Emitting the steps of a program from the nodes of a graph: addresses, packed constants, and tasks for the threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastens.plan import graph
from fastens.plan.cpu.convolution import convolution
from fastens.plan.graph import Code, TorchCall, View
from fastens.plan.loops import simplified
from fastens.plan.memory import HALVES, At, Buffer, Cast, Constant, Constants, address_unit
from fastens.program import steps
from fastens.program.steps import NONE, Activation, Image, Opcode, Slot, Step, Strided
from fastens.raw import raw

_POINTWISE_GRAIN = 8192  # elements that are worth a task
_DRAW_GRAIN = 4096


class Emitter:
    """Steps in the order of the nodes.

    Args:
        constants: the packed weights of the ensemble, which this program adds its own to.
        num_threads: that share the steps.
        exact: whether what a step computes is chosen by one row's shape.

    Attributes:
        steps: the steps, and calls of torch between them.
        kinds: by kind of node, what appends its steps.
    """

    def __init__(self, constants: Constants, num_threads: int, exact: bool) -> None:
        self.constants = constants
        self.num_threads = num_threads
        self.exact = exact
        self.steps: list[Step | TorchCall] = []
        self.kinds: dict[type, Callable[[Any], None]] = {
            graph.Conv: lambda node: self.steps.append(convolution(self, node)),
            graph.Norm: self._norm,
            graph.Materialize: self._materialize,
            graph.Pointwise: lambda node: self._pointwise(node.out, node.inputs, node.code),
            graph.LayerNorm: self._layer_norm,
            graph.Attention: self._attention,
            graph.Gather: self._gather,
            graph.Draw: self._draw,
            TorchCall: self.steps.append,
        }

    def emit(self, node: graph.Node) -> None:
        """Append what computes a node."""
        self.kinds[type(node)](node)

    # Operands

    def at(self, view: View) -> At:
        """The place of a view's first element; a constant is kept as float32."""
        where = view.where
        if isinstance(where, Constant):
            return self.constants.add(where.key, where.tensor, where.source).plus(view.offset)
        if isinstance(where, Buffer):
            return At(where, view.offset * address_unit(where.dtype))
        base = where.where if isinstance(where, Cast) else where
        start = base if isinstance(base, Buffer) else Slot.ARGUMENTS + base.number
        return At(start, view.offset * where.dtype.itemsize)

    def at_or_none(self, view: View | None) -> Any:
        """The place of a view, or that there is none."""
        return NONE if view is None else self.at(view)

    def bits(self, view: View | None) -> Any:
        """The place of whole numbers, or that there are none; constants are kept as they are."""
        if view is None or not isinstance(view.where, Constant):
            return self.at_or_none(view)
        constant = view.where
        flat = raw(constant.tensor)
        held = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.float32)
        return self.constants.add(constant.key, held, constant.source)

    def parameters(self, constant: Constant | None) -> Any:
        """The place of a norm's weight or bias, or that there is none."""
        return NONE if constant is None else self.constants.add(constant.key, constant.tensor, constant.source)

    def image(self, view: View) -> Image:
        """An image [R, C, H, W]."""
        row, _, y, x = view.stride
        return Image(self.at(view), row, y, x, view.size[1], view.size[0])

    def pair(self, images: tuple[View, ...]) -> tuple[Image, Image]:
        """One image or two as the two operands of a step."""
        first, *second = map(self.image, images)
        return first, second[0] if second else Image()

    def mask(self, mask: graph.Mask | None) -> steps.Mask:
        """A mask, or that there is none."""
        if mask is None:
            return steps.Mask()
        row, pixel, _ = mask.bits.stride
        return steps.Mask(self.bits(mask.bits), row, pixel, mask.runs.rows, self.bits(mask.runs.members), mask.scale)

    def _strided(self, view: View) -> Strided:
        """An elementwise operand; half precision in buffers is held in float32, and constants are."""
        where = view.where
        held = isinstance(where, Constant) or (isinstance(where, Buffer) and where.dtype in HALVES)
        return Strided(self.at(view), 0 if held else steps.DTYPES[where.dtype], list(view.stride))

    # Nodes

    def _norm(self, node: graph.Norm) -> None:
        rows, channels = node.scale.size
        height, width = node.images[0].size[2:]
        splits = 1
        if rows * 2 <= 2 * self.num_threads + 1 and channels >= 64 and channels // node.groups >= 8:
            splits = min(2, node.groups)
        self.steps.append(
            steps.Norm(
                rows, node.runs.rows, splits, self.pair(node.images), height, width, node.groups,
                self.parameters(node.weight), self.parameters(node.bias), *self._rows(node.row_scale),
                *self._rows(node.row_shift), node.eps, self.at(node.scale), self.at(node.shift),
                self.bits(node.runs.members), tasks=rows * splits,
            )
        )  # fmt: skip

    def _rows(self, view: View | None) -> tuple[Any, int]:
        """The place of [R, C], and its stride between rows."""
        return self.at_or_none(view), 0 if view is None else view.stride[0]

    def _materialize(self, node: graph.Materialize) -> None:
        if node.source.mask is not None:
            self._drop(node)
            return
        for part in node.elementwise():
            self._pointwise(part.out, part.inputs, part.code)

    def _drop(self, node: graph.Materialize) -> None:
        source, (rows, _, height, width) = node.source, node.out.size
        splits = max(1, min(height, 4 * self.num_threads // rows))
        self.steps.append(
            steps.Drop(
                rows, splits, self.pair(source.images), height, width, self.at_or_none(source.scale),
                self.at_or_none(source.shift), int(Activation[source.activation.upper()]), self.mask(source.mask),
                self.image(node.out), tasks=rows * splits,
            )
        )  # fmt: skip

    def _pointwise(self, out: View, inputs: list[View], code: Code) -> None:
        """An elementwise step, its runs split where there are too few of them for the threads."""
        sizes, strides = simplified(list(out.size), [list(view.stride) for view in (out, *inputs)])
        numel = 1
        for n in sizes:
            numel *= n
        if numel == 0:
            return
        operands = [
            dataclasses.replace(self._strided(view), strides=s) for view, s in zip((out, *inputs), strides, strict=True)
        ]
        runs = numel // sizes[-1]
        tasks = max(1, min(runs, numel // _POINTWISE_GRAIN, 4 * self.num_threads))
        words: list[int | float] = []
        for opcode, a, b, number in code + [(Opcode.COPY, 0, 0, 0.0)] * (steps.MAX_INSTRUCTIONS - len(code)):
            words += [int(opcode) | a << 16 | b << 32, float(number)]
        padding = [Strided() for _ in range(steps.MAX_INPUTS - len(inputs))]
        self.steps.append(
            steps.Pointwise(sizes, operands[0], len(inputs), operands[1:] + padding, len(code), words, tasks=tasks)
        )

    def _layer_norm(self, node: graph.LayerNorm) -> None:
        (rows, tokens, channels), x, out = node.out.size, node.x, node.out
        self.steps.append(
            steps.LayerNorm(
                rows, node.runs.rows, tokens, channels, self.at(x), x.stride[0], x.stride[1],
                self.parameters(node.weight), self.parameters(node.bias), NONE, 0, NONE, 0, node.eps, self.at(out),
                out.stride[0], out.stride[1], self.bits(node.runs.members), tasks=rows,
            )
        )  # fmt: skip

    def _attention(self, node: graph.Attention) -> None:
        (rows, count, queries, width), (keys, value_width) = node.q.size, node.v.size[2:]
        chunk = queries if rows * count >= 4 * self.num_threads else max(16, -(-queries // 4))
        q, k, v, out = (steps.Heads(self.at(view), *view.stride) for view in (node.q, node.k, node.v, node.out))
        tasks = rows * count * -(-queries // chunk)
        self.steps.append(
            steps.Attention(
                rows, count, queries, keys, width, value_width, chunk, q, k, v, out, node.scale, tasks=tasks
            )
        )

    def _gather(self, node: graph.Gather) -> None:
        rows, width = node.out.size
        self.steps.append(steps.Gather(rows, width, self.at(node.table), self.at(node.members), self.at(node.out)))

    def _draw(self, node: graph.Draw) -> None:
        for bits, key, channels, (pixel_step, channel_step) in zip(
            node.bits, node.keys, node.channels, node.steps, strict=True
        ):
            rows, count, words = bits.size
            own = dataclasses.replace(node.drawn, offset=node.drawn.offset + 1 + key)
            per_row = count * words * steps.LANES
            splits = max(1, min(-(-count // 4), per_row // _DRAW_GRAIN, -(-3 * self.num_threads // rows)))
            self.steps.append(
                steps.Draw(
                    rows, node.rows_per_member, splits, count, channels, pixel_step, channel_step, self.at(own),
                    self.at(node.drawn), self.at(node.samples), node.threshold, self.at(bits), count * words, words,
                    self.bits(node.members), tasks=rows * splits,
                )
            )  # fmt: skip
