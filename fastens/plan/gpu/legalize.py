"""Legalization: nodes of a graph as nodes that kernels of a GPU take.

A norm's scale and shift become moments, by which a prologue normalises; what a kernel does not read on its
way, such as two images that are enlarged, is written before; masks are of as many rows or members as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastens.device import device_of
from fastens.plan import graph
from fastens.plan.gpu.launch import Conv, GroupNorm, Join, LayerNorm, Masked, Moments
from fastens.plan.graph import (
    ACTIVATIONS,
    Attention,
    Code,
    Draw,
    Gather,
    Mask,
    Materialize,
    Node,
    Norm,
    Pointwise,
    Runs,
    Source,
    TorchCall,
    View,
)
from fastens.plan.loops import simplified
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.target import Target
from fastens.plan.memory import Cast, Constant, KeptTensors
from fastens.program import steps
from fastens.program.block import ConvBlock, Epilogue, Prologue
from fastens.program.steps import Opcode
from fastens.reference.group_moments import counts
from fastens.trace.record import NotLowerable

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# a launch reads tensors, which have the dtypes that were recorded
TARGET = Target(
    floats=_FLOATS,
    copied=(*_FLOATS, *(dtype for dtype in steps.DTYPES if dtype not in _FLOATS)),
    read_in_buffers=(*_FLOATS, torch.float64),
    read_in_arguments=(*_FLOATS, torch.float64),
    widens=False,
    tables=False,
    mask_lanes=32,
    divides=False,
    fills=False,
    copies_all=True,
    exact_log=True,
    shared_heads=False,
)


class Legalizer:
    """Nodes that kernels take, in the order of the graph's.

    Args:
        builder: of the graph.
        constants: the ensemble's stacks and what is derived from them.
        device: where the nodes run.

    Attributes:
        nodes: the nodes.
        kinds: by kind of node, what appends those that kernels take.
    """

    def __init__(self, builder: Builder, constants: KeptTensors, device: torch.device) -> None:
        self.builder = builder
        self.constants = constants
        self.device = device
        self.nodes: list[Node] = []
        self._norms: dict[Any, tuple[Norm, View, View]] = {}  # by their scale: its norm, the image and its moments
        self._joined: dict[tuple[Any, ...], View] = {}
        self.kinds: dict[type, Callable[[Any], None]] = {
            graph.Conv: self._conv,
            graph.LayerNorm: self._layer_norm,
            Norm: self._norm,
            Materialize: self._materialize,
            Pointwise: self._pointwise,
            **dict.fromkeys((Attention, Draw, Gather, TorchCall), self.nodes.append),
        }
        for node in builder.nodes:
            if any(isinstance(view.where, Cast) for view in (*node.reads(), *node.writes())):
                raise NotLowerable(f"{node.name} of a value that is held in another dtype")
            self.kinds[type(node)](node)
            self._join_anew({view.where for view in node.writes()})

    def _join_anew(self, written: set[Any]) -> None:
        """Forget joins of images that a node has written to."""
        self._joined = {
            key: view for key, view in self._joined.items() if written.isdisjoint(v.where for v in key[:-1])
        }

    # Operands

    def _fresh(self, size: tuple[int, ...], dtype: torch.dtype) -> View:
        """A buffer of its own for an image [R, C, H, W] with its channels last."""
        _, channels, height, width = size
        stride = (channels * height * width, 1, channels * width, channels)
        return View(self.builder.buffer(math.prod(size), dtype), 0, size, stride)

    def _image(self, images: tuple[View, ...], up: int) -> View:
        """Images as one: enlarged or joined first where it is not."""
        if len(images) == 1 and up == 1:
            return images[0]
        key = (*images, up)
        if key not in self._joined:
            rows, _, height, width = images[0].size
            channels = sum(image.size[1] for image in images)
            whole = self._fresh((rows, channels, height * up, width * up), images[0].dtype)
            self.nodes.append(Join(whole, list(images), up))
            self._joined[key] = whole
        return self._joined[key]

    def _tensor(self, constant: Constant | None) -> Tensor | None:
        return None if constant is None else self.constants.add(constant)

    def _offsets(self, runs: Runs) -> View | None:
        """Where each member's rows begin, [K+1], of rows that are dealt out in every call.

        Raises:
            NotLowerable: the rows are parts of those that are dealt out.
        """
        if runs.members is None:
            return None
        if runs.rows != 1:
            raise NotLowerable("parts of rows that are dealt out anew in every call, in launches")
        number = len(self.builder.recording.inputs) - 2
        return View(self.builder.arguments[number], 0, self.builder.recording.inputs[number].size, (1,))

    def _bits(self, mask: Mask, space: tuple[int, int], rows: int, by_weights: int | None = None) -> View | Tensor:
        """The bits of a mask, int32 [K or R, H, W, words]: of members where these are equal groups of rows.

        ``by_weights`` is of a convolution: its weights' K where each row has its mask by them, none for other nodes.
        """
        (height, width), words, where, runs = space, mask.bits.size[-1], mask.bits.where, mask.runs
        stride = (height * width * words, width * words, words, 1)
        if not isinstance(where, Constant):
            return View(where, 0, (rows, height, width, words), stride)
        held = self.constants.add(where).unflatten(1, (height, width))
        if runs.members is None and runs.rows * len(held) != rows:
            raise NotLowerable("dropout masks of other rows, in launches")
        by_members = runs.members is None if by_weights is None else by_weights == len(held)
        if by_members:
            return held
        if runs.members is None:
            repeated = held.repeat_interleave(runs.rows, 0)
            return self.constants.add(Constant((where.key, runs.rows, tuple(held.shape)), repeated, None))
        gathered = View(self.builder.buffer(rows * stride[0], torch.int32), 0, (rows, height, width, words), stride)
        self.nodes.append(Gather(gathered, held, runs.members))
        return gathered

    # Nodes

    def _norm(self, node: Norm) -> None:
        """norm(x) = a table of scale and shift  ->  moments of x, of which what reads it makes scale and shift."""
        image = self._image(node.images, 1)
        rows, groups, spans = image.size[0], node.groups, len(counts(image.size[2] * image.size[3]))
        size, stride = (rows, groups, spans, 2), (groups * spans * 2, spans * 2, 2, 1)
        moments = View(self.builder.buffer(math.prod(size)), 0, size, stride)
        self.nodes.append(Moments(moments, image, groups))
        self._norms[node.scale.where] = (node, image, moments)

    def _prologue(self, scale: View) -> Prologue[View]:
        """The norm of a scale, as a convolution applies it."""
        norm, _, moments = self._norms[scale.where]
        weight, bias = self._tensor(norm.weight), self._tensor(norm.bias)
        return Prologue(moments, weight, bias, norm.eps, norm.row_scale, norm.row_shift)

    def _normalised(self, source: Source) -> tuple[View, Prologue[View]]:
        """The image that is normalised, and the norm; a norm of what is enlarged is computed before."""
        scale, up = source.scale, source.up
        if scale is None:
            return self._image(source.images, up), Prologue()
        if up == 1:
            return self._image(source.images, 1), self._prologue(scale)
        norm, image, _ = self._norms[scale.where]
        rows, channels, height, width = image.size
        small = self._fresh(image.size, image.dtype)
        read = self._image(source.images, 1)
        self.nodes.append(GroupNorm(small, read, self._prologue(scale), self._offsets(norm.runs)))
        large = self._fresh((rows, channels, height * up, width * up), small.dtype)
        self.nodes.append(Join(large, [small], up))
        return large, Prologue()

    def _conv(self, node: graph.Conv) -> None:
        """conv(source) with scale and shift of a table  ->  a block, which normalises by moments as it reads."""
        out, source, rows = node.out, node.source, node.out.size[0]
        x, before = self._normalised(source)
        weight = self.constants.stack(node.weight)
        mask, mask_scale = None, 1.0
        if source.mask is not None:
            by_weights = len(weight) if _same_place(source.mask.runs.members, node.runs.members) else 0
            mask = self._bits(source.mask, source.space, rows, by_weights)
            mask_scale = source.mask.scale
        before = before._replace(
            norm_weight=_of_each(before.norm_weight, len(weight)), norm_bias=_of_each(before.norm_bias, len(weight)),
            activation=source.activation, mask=mask, mask_scale=mask_scale,
        )  # fmt: skip
        behind = node.epilogue
        if x.size[0] != rows or (behind.residual is not None and behind.residual.size[0] != rows):
            raise NotLowerable("rows that share an image, in launches")
        result = out if node.dropped is None else self._fresh(out.size, out.dtype)
        bias = _of_each(None if node.bias is None else node.bias.tensor, len(weight))
        block = ConvBlock(
            x, weight, bias, node.stride, node.padding, self._offsets(node.runs), prologue=before,
            epilogue=behind if node.dropped is None else Epilogue(behind.row_bias),
        )  # fmt: skip
        self.nodes.append(Conv(result, block, None))
        if node.dropped is not None:
            self._behind_mask(node.dropped, result, out, behind)

    def _behind_mask(self, mask: Mask, result: View, out: View, behind: Epilogue[View]) -> None:
        """Drop elements of a convolution's result, and then what else is behind it."""
        residual, output_scale, output_activation = behind.residual, behind.output_scale, behind.output_activation
        code: Code = []
        inputs = [result] if residual is None else [result, residual]

        def last() -> int:
            return len(inputs) + len(code) - 1 if code else 0

        if residual is not None:
            code.append((Opcode.ADD, 0, 1, 0.0))
        if output_scale != 1:
            code.append((Opcode.MULTIPLY_NUMBER, last(), 0, output_scale))
        if output_activation != "none":
            code.append((ACTIVATIONS[output_activation], last(), 0, 0.0))
        kept = self._fresh(out.size, out.dtype) if code else out
        bits = self._bits(mask, (out.size[2], out.size[3]), out.size[0])
        self.nodes.append(Masked(kept, result, bits, mask.scale))
        if code:
            inputs[0] = kept
            self.nodes.append(Pointwise(out, inputs, code))

    def _materialize(self, node: Materialize) -> None:
        """A source in memory  ->  group norm, mask, or elementwise nodes."""
        out, source = node.out, node.source
        if source.mask is None and source.scale is None:
            for part in node.elementwise():
                self._pointwise(part)
        elif source.mask is None:
            self._activated(out, source)
        else:
            if source.scale is None and source.activation == "none":
                x = self._image(source.images, 1)
            else:
                x = self._fresh(out.size, out.dtype)
                self._activated(x, source)
            self.nodes.append(Masked(out, x, self._bits(source.mask, source.space, out.size[0]), source.mask.scale))

    def _activated(self, out: View, source: Source) -> None:
        """Norm and activation into memory."""
        image, prologue = self._normalised(source)
        prologue = prologue._replace(activation=source.activation)
        of = None if source.scale is None or prologue.moments is None else self._norms[source.scale.where][0]
        self.nodes.append(GroupNorm(out, image, prologue, None if of is None else self._offsets(of.runs)))

    def _pointwise(self, node: Pointwise) -> None:
        """The same over as few dimensions as it has."""
        operands = [node.out, *node.inputs]
        sizes, strides = simplified(list(node.out.size), [list(view.stride) for view in operands])
        out, *inputs = (_kept(view, sizes, stride) for view, stride in zip(operands, strides, strict=True))
        self.nodes.append(Pointwise(out, inputs, self._as_torch(node.code)))

    def _as_torch(self, code: Code) -> Code:
        """(x / d)  ->  x (1 / d), by the reciprocal that torch itself takes on CUDA."""
        if not device_of(self.device).launches:
            return code
        one = torch.ones((), device=self.device)
        return [
            (Opcode.MULTIPLY_NUMBER, a, b, (one / number).item()) if opcode is Opcode.DIVIDE_NUMBER else instruction
            for instruction in code
            for opcode, a, b, number in (instruction,)
        ]

    def _layer_norm(self, node: graph.LayerNorm) -> None:
        weight, bias = self._tensor(node.weight), self._tensor(node.bias)
        self.nodes.append(LayerNorm(node.out, node.x, weight, bias, node.eps, self._offsets(node.runs)))


def _kept(view: View, sizes: list[int], strides: list[int]) -> View:
    """A view without dimensions of one element, whose strides mean nothing: libraries believe them."""
    kept = [(n, stride) for n, stride in zip(sizes, strides, strict=True) if n > 1] or [(1, 1)]
    size, stride = zip(*kept, strict=True)
    return View(view.where, view.offset, size, stride)


def _same_place(a: View | None, b: View | None) -> bool:
    """Whether both begin with the same element, or neither is there."""
    return a is b if a is None or b is None else (a.where, a.offset) == (b.where, b.offset)


def _of_each(values: Tensor | None, num_members: int) -> Tensor | None:
    """[K, C] of what all members may share, as [1, C]."""
    return None if values is None else values.detach().expand(num_members, -1).contiguous()
