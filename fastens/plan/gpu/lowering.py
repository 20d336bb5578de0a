"""From the steps of a recorded pass to launches: calls that each read and write views of memory laid out later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.plan.gpu import calls as run
from fastens.plan.gpu.launch import (
    Attention,
    Code,
    Conv,
    Draw,
    Gather,
    GroupNorm,
    Join,
    Launch,
    LayerNorm,
    Masked,
    Moments,
    Pointwise,
    TorchCall,
    View,
)
from fastens.plan.gpu.typed import Normalised, TypedEmitter
from fastens.plan.lowering.registry import constants_of
from fastens.plan.memory import At, Buffer, Kept, address_unit
from fastens.plan.torch_call import Call
from fastens.program import steps
from fastens.program.block import ConvBlock, Epilogue, Prologue
from fastens.program.steps import NONE, Activation, Image, Opcode, Slot, Strided
from fastens.reference.group_moments import counts
from fastens.trace.record import NotLowerable, Ref, mapped

_NO_MASK = steps.Mask()
_WORD = 32  # channels of a word of a mask
_ACTIVATIONS = {int(a): a.name.lower() for a in Activation}


@dataclasses.dataclass
class _Statistics:
    """A group norm whose moments are known: the image that it normalises, its moments, and its step."""

    image: View
    moments: View
    step: steps.Norm


class Launches:
    """The launches of the steps of an emitter, in order."""

    def __init__(self, emitter: TypedEmitter, device: torch.device, backend: str) -> None:
        self.emitter = emitter
        self.device = device
        self.backend = backend
        self.inputs = emitter.recording.inputs
        self.list: list[Launch] = []
        self._norms: dict[Any, _Statistics] = {}
        self._joined: dict[Any, View] = {}
        self._bits: dict[Any, View] = {}  # of fresh masks
        lowered: dict[type, Callable[[Any], None]] = {
            steps.Conv: self._conv,
            steps.Norm: self._norm,
            steps.Pointwise: self._pointwise,
            steps.LayerNorm: self._layer_norm,
            steps.Attention: self._attention,
            Normalised: self._normalised,
            steps.Gather: self._gather,
            steps.Draw: self._draw,
            steps.Drop: self._drop,
            Call: self._call,
        }
        for step in emitter.steps:
            if type(step) not in lowered:
                raise NotLowerable(f"a step of the kind {type(step).__name__.lower()} in launches")
            lowered[type(step)](step)

    # Places

    def view(self, at: At, size: tuple[int, ...], stride: tuple[int, ...]) -> View:
        """Elements at a place."""
        if isinstance(at.where, int) and at.where - Slot.ARGUMENTS < len(self.inputs):
            unit = self.inputs[at.where - Slot.ARGUMENTS].dtype.itemsize
        elif isinstance(at.where, Buffer):
            unit = address_unit(at.where.dtype)
        else:
            unit = 4
        return View(at.where, at.num_bytes // unit, size, stride)

    def _image(self, image: Image, height: int, width: int) -> View:
        """[R, C, H, W]."""
        size = (image.rows, image.channels, height, width)
        return self.view(image.at, size, (image.row, 1, image.y, image.x))

    def _fresh(self, size: tuple[int, ...], dtype: torch.dtype) -> View:
        """A buffer of its own for an image [R, C, H, W] with its channels last."""
        _, channels, height, width = size
        stride = (channels * height * width, 1, channels * width, channels)
        return View(self.emitter.buffer(math.prod(size), dtype), 0, size, stride)

    def _dtype(self, view: View) -> torch.dtype:
        if isinstance(view.where, Buffer):
            return view.where.dtype
        if isinstance(view.where, Kept):
            return view.where.tensor.dtype
        return self.inputs[view.where - Slot.ARGUMENTS].dtype

    def _source(self, sources: tuple[Image, Image], up: int, height: int, width: int) -> View:
        """What a step reads as one image: enlarged or joined first where it is not."""
        images = [self._image(s, height // up, width // up) for s in sources if s.channels]
        if len(images) == 1 and up == 1:
            return images[0]
        key = (*images, up)
        if key not in self._joined:
            channels = sum(image.size[1] for image in images)
            whole = self._fresh((images[0].size[0], channels, height, width), self._dtype(images[0]))
            self.list.append(Join(whole, images, up, self.backend))
            self._joined[key] = whole
        return self._joined[key]

    def _rows(self, at: Any, stride: int, rows: int, channels: int) -> View | None:
        """[R, C] of a place, none where there is none."""
        return None if at == NONE else self.view(at, (rows, channels), (stride, 1))

    @staticmethod
    def _stack(at: Any, channels: int) -> Tensor | None:
        """[K, C] of a constant, without what it was filled up with; [1, C] of one that all members share."""
        if at == NONE:
            return None
        values: Tensor = at.where.tensor
        return (values[None] if values.ndim == 1 else values.flatten(1))[:, :channels].contiguous()

    def _offsets(self, step: Any) -> View | None:
        """Where each member's rows begin, [K+1], of a step whose rows are dealt out in every call.

        Raises:
            NotLowerable: the rows are parts of those that are dealt out.
        """
        if step.members == NONE:
            return None
        if step.rows_per_member != 1:
            raise NotLowerable("parts of rows that are dealt out anew in every call, in launches")
        number = len(self.inputs) - 2
        return View(Slot.ARGUMENTS + number, 0, self.inputs[number].size, (1,))

    # Steps

    def _norm(self, step: steps.Norm) -> None:
        image = self._source(step.sources, 1, step.height, step.width)
        spans = len(counts(step.height * step.width))
        size, stride = (step.rows, step.groups, spans, 2), (step.groups * spans * 2, spans * 2, 2, 1)
        moments = View(self.emitter.buffer(math.prod(size)), 0, size, stride)
        self.list.append(Moments(moments, image, step.groups, self.backend))
        self._norms[step.out_scale.where] = _Statistics(image, moments, step)

    def _prologue(self, of: _Statistics) -> Prologue[View]:
        """The norm as a convolution applies it."""
        step, channels = of.step, of.image.size[1]
        return Prologue(
            moments=of.moments,
            norm_weight=self._stack(step.weight, channels),
            norm_bias=self._stack(step.bias, channels),
            eps=step.eps,
            scale=self._rows(step.row_scale, step.row_scale_row, step.rows, channels),
            shift=self._rows(step.row_shift, step.row_shift_row, step.rows, channels),
        )

    def _normed(
        self, scale: Any, sources: tuple[Image, Image], up: int, height: int, width: int
    ) -> tuple[View, Prologue[View]]:
        """The image that is normalised, and the norm; a norm of what is enlarged is computed before."""
        if scale == NONE:
            return self._source(sources, up, height, width), Prologue()
        of = self._norms[scale.where]
        if up == 1:
            return self._source(sources, 1, height, width), self._prologue(of)
        rows, channels = of.image.size[:2]
        small = self._fresh((rows, channels, height // up, width // up), self._dtype(of.image))
        image = self._source(sources, 1, height // up, width // up)
        self.list.append(GroupNorm(small, image, self._prologue(of), self._offsets(of.step), self.backend))
        large = self._fresh((rows, channels, height, width), self._dtype(small))
        self.list.append(Join(large, [small], up, self.backend))
        return large, Prologue()

    def _normalised(self, step: Normalised) -> None:
        self._activated(self._image(step.out, step.height, step.width), step, step.table_scale, step.up, step.act_in)

    def _activated(self, out: View, step: Normalised | steps.Drop, scale: Any, up: int, activation: int) -> None:
        """Norm and activation into memory."""
        image, prologue = self._normed(scale, step.sources, up, step.height, step.width)
        prologue = prologue._replace(activation=_ACTIVATIONS[activation])
        offsets = self._offsets(self._norms[scale.where].step) if prologue.moments is not None else None
        self.list.append(GroupNorm(out, image, prologue, offsets, self.backend))

    def _conv(self, step: steps.Conv) -> None:
        out = self._image(step.out, step.out_h, step.out_w)
        x, before = self._normed(step.table_scale, step.sources, step.up, step.in_h, step.in_w)
        weight: Tensor = step.weight.where.tensor
        mask, mask_scale = self._mask(step, weight)
        before = before._replace(
            norm_weight=_of_each(before.norm_weight, len(weight)), norm_bias=_of_each(before.norm_bias, len(weight)),
            activation=_ACTIVATIONS[step.act_in], mask=mask, mask_scale=mask_scale,
        )  # fmt: skip
        row_bias = self._rows(step.row_vector, step.row_vector_row, step.rows, step.out_channels)
        residual = self._image(step.residual, step.out_h, step.out_w) if step.residual.channels else None
        if x.size[0] != step.rows or (residual is not None and residual.size[0] != step.rows):
            raise NotLowerable("rows that share an image, in launches")
        behind = Epilogue(row_bias, residual, step.scale, _ACTIVATIONS[step.act_out])
        dropped = step.mask_out != _NO_MASK
        result = self._fresh(out.size, self._dtype(out)) if dropped else out
        block = ConvBlock(
            x, weight, _of_each(self._stack(step.bias, step.out_channels), len(weight)),
            (step.stride_h, step.stride_w), (step.pad_top, step.pad_left), self._offsets(step), prologue=before,
            epilogue=Epilogue(row_bias) if dropped else behind,
        )  # fmt: skip
        self.list.append(Conv(result, block, None, self.backend))
        if dropped:
            self._behind_mask(step, result, out, behind)

    def _behind_mask(self, step: steps.Conv, result: View, out: View, behind: Epilogue[View]) -> None:
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
            code.append((run.ACTIVATIONS[output_activation], last(), 0, 0.0))
        kept = self._fresh(out.size, self._dtype(out)) if code else out
        bits = self._bits_of(step.mask_out, step.out_channels, step.out_h, step.out_w, step.rows)
        self.list.append(Masked(kept, result, bits, step.mask_out.scale, self.backend))
        if code:
            inputs[0] = kept
            self.list.append(Pointwise(out, inputs, code, self.backend))

    def _draw(self, step: steps.Draw) -> None:
        size = (step.rows, step.pixels, -(-step.channels // _WORD))
        stride = (size[1] * size[2], size[2], 1)
        bits = View(self.emitter.buffer(math.prod(size), torch.int32), 0, size, stride)
        number = step.evaluation.where - Slot.ARGUMENTS
        drawn = View(step.evaluation.where, 0, self.inputs[number].size, (1,))
        which = step.key.num_bytes // 8 - 1
        members = None if step.members == NONE else self.view(step.members, (step.rows,), (1,))
        samples = self.view(step.samples, (step.rows,), (1,))
        self.list.append(
            Draw([bits], drawn, [which], members, samples, step.rows_per_member, step.threshold, [step.channels],
                 [(step.pixel_step, step.channel_step)], self.backend)
        )  # fmt: skip
        self._bits[step.out.where] = bits

    def _drop(self, step: steps.Drop) -> None:
        out = self._image(step.out, step.height, step.width)
        if step.table_scale == NONE and step.activation == Activation.NONE:
            x = self._source(step.sources, 1, step.height, step.width)
        else:
            x = self._fresh(out.size, self._dtype(out))
            self._activated(x, step, step.table_scale, 1, step.activation)
        bits = self._bits_of(step.mask, out.size[1], step.height, step.width, step.rows)
        self.list.append(Masked(out, x, bits, step.mask.scale, self.backend))

    def _mask(self, step: steps.Conv, weight: Tensor) -> tuple[View | Tensor | None, float]:
        """The bits of what dropout keeps of a convolution's input, int32 [K or R, H, W, words], and its factor."""
        if step.mask_in == _NO_MASK:
            return None, 1.0
        by_weights = weight.shape[0] if step.mask_in.members == step.members else 0
        bits = self._bits_of(step.mask_in, weight.shape[2], step.in_h, step.in_w, step.rows, by_weights)
        return bits, step.mask_in.scale

    def _bits_of(
        self, mask: steps.Mask, channels: int, height: int, width: int, rows: int, by_weights: int | None = None
    ) -> View | Tensor:
        """The bits of a mask, int32 [K or R, H, W, ceil(C / 32)]: of members where these are equal groups of rows.

        ``by_weights`` is of a convolution: its weights' K where each row has its mask by them, none for other launches.
        """
        where, words = mask.at.where, -(-channels // _WORD)
        if where in self._bits:
            size = (rows, height, width, words)
            return View(self._bits[where].where, 0, size, (height * width * words, width * words, words, 1))
        halves = -(-channels // steps.LANES)
        flat, each = where.tensor.view(torch.int16), height * width * halves
        held = flat[: len(flat) // each * each].view(-1, height, width, halves)
        held = F.pad(held, (0, halves % 2)).view(torch.int32)
        key = ("mask", where, tuple(held.shape))
        if mask.members == NONE and mask.rows * len(held) != rows:
            raise NotLowerable("dropout masks of other rows, in launches")
        by_members = mask.members == NONE if by_weights is None else by_weights == len(held)
        if mask.members == NONE and not by_members:
            key, held = (*key, mask.rows), held.repeat_interleave(mask.rows, 0)
        kept: Tensor = self.emitter.constants.add(key, held).where.tensor
        if mask.members == NONE or by_members:
            return kept
        size, stride = (rows, *kept.shape[1:]), kept.stride()
        gathered = View(self.emitter.buffer(math.prod(size), torch.int32), 0, size, stride)
        members = self.view(mask.members, (rows,), (1,))
        self.list.append(Gather(gathered, kept, members))
        return gathered

    def _operand(self, operand: Strided, sizes: list[int]) -> View:
        kept = [(n, stride) for n, stride in zip(sizes, operand.strides, strict=True) if n > 1] or [(1, 1)]
        size, stride = zip(*kept, strict=True)  # without strides of 0 that mean nothing: libraries believe them
        return self.view(operand.at, size, stride)

    def _pointwise(self, step: steps.Pointwise) -> None:
        code = []
        for i in range(step.num_instructions):
            word, number = step.instructions[2 * i : 2 * i + 2]
            word = int(word)
            opcode, number = self._as_torch(Opcode(word & 0xFFFF), float(number))
            code.append((opcode, word >> 16 & 0xFFFF, word >> 32, number))
        inputs = [self._operand(x, step.sizes) for x in step.inputs[: step.num_inputs]]
        self.list.append(Pointwise(self._operand(step.out, step.sizes), inputs, code, self.backend))
        written = step.out.at.where
        self._joined = {
            key: view for key, view in self._joined.items() if all(v.where is not written for v in key[:-1])
        }

    def _as_torch(self, opcode: Opcode, number: float) -> tuple[Opcode, float]:
        """On CUDA torch itself multiplies by a reciprocal where it divides by a number: by that which it takes."""
        if opcode is not Opcode.DIVIDE_NUMBER or self.device.type != "cuda":
            return opcode, number
        return Opcode.MULTIPLY_NUMBER, (torch.ones((), device=self.device) / number).item()

    def _layer_norm(self, step: steps.LayerNorm) -> None:
        size = (step.rows, step.tokens, step.channels)
        x = self.view(step.source, size, (step.source_row, step.source_token, 1))
        out = self.view(step.out, size, (step.out_row, step.out_token, 1))
        weight, bias = (self._stack(at, step.channels) for at in (step.weight, step.bias))
        self.list.append(LayerNorm(out, x, weight, bias, step.eps, self.backend, self._offsets(step)))

    def _gather(self, step: steps.Gather) -> None:
        size = (step.rows, step.count)
        out = self.view(step.out, size, (step.count, 1))
        lines = (self.emitter.num_members, step.count)
        table = self.view(step.table, lines, (step.count, 1))
        members = self.view(step.members, (step.rows,), (1,))
        self.list.append(Gather(out, table, members))

    def _attention(self, step: steps.Attention) -> None:
        def heads(of: steps.Heads, tokens: int, width: int) -> View:
            size = (step.rows, step.heads, tokens, width)
            return self.view(of.at, size, (of.row, of.head, of.token, of.channel))

        self.list.append(
            Attention(
                heads(step.out, step.queries, step.value_width), heads(step.q, step.queries, step.width),
                heads(step.k, step.keys, step.width), heads(step.v, step.keys, step.value_width), step.scale,
                self.backend,
            )
        )  # fmt: skip

    def _call(self, step: Call) -> None:
        def seen(ref: Ref) -> View:
            found = self.view(step.places[ref], ref.size, ref.stride)
            if self._dtype(found) != ref.dtype:
                raise NotLowerable(f"{step.func} of a value that is held in another dtype")
            return found

        args, kwargs = constants_of(self.emitter, (step.args, step.kwargs))
        args, kwargs = mapped(Ref, seen, (args, kwargs))
        self.list.append(TorchCall([seen(out) for out in step.outs], step.func, args, kwargs))


def _of_each(values: Tensor | None, num_members: int) -> Tensor | None:
    """[K, C] of what all members may share, as [1, C]."""
    return None if values is None else values.expand(num_members, -1).contiguous()
