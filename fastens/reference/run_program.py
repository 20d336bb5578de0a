"""A program, interpreted naively: every step as the torch operations that it stands for.

Sums are taken in float64, so that a kernel's error is its own; only elementwise chains are computed in float32 like the
registers they describe.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.program import steps
from fastens.program.steps import Activation, Image, Opcode
from fastens.program.winograd import recovered
from fastens.reference._activation import activate
from fastens.reference.dropout import dropout
from fastens.reference.pointwise import instructed


def run_program(
    program: Tensor, weights: Tensor, arena: Tensor, inputs: list[Tensor], outputs: list[Tensor], num_threads: int
) -> None:
    """Run the steps of a program one after the other. Arguments as of :func:`fastens.ops.run_program.run_program`."""
    memory = _Memory([arena, weights, *inputs, *outputs])
    for step in steps.decode(program):
        _RUNS[type(step)](step, memory)


class _Memory:
    """The slots of a call, as views of what an address points to."""

    def __init__(self, slots: list[Tensor]) -> None:
        self.slots = slots

    def view(self, at: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A view of the memory at an address."""
        slot, num_bytes = self.slots[at >> 48], at & ((1 << 48) - 1)
        offset = cast(int, slot.storage_offset())  # a number: nothing here is traced
        start, rest = divmod(offset * slot.element_size() + num_bytes, dtype.itemsize)
        if rest:
            raise ValueError(f"`program`: {num_bytes} bytes into slot {at >> 48} is no address of a {dtype}")
        return torch.empty(0, dtype=dtype).set_(slot.untyped_storage(), start, tuple(size), tuple(stride))

    def rows(self, at: int, row: int, size: tuple[int, int]) -> Tensor | None:
        """Return [R, C] in float64 whose rows are ``row`` elements apart, None for a null address."""
        return None if at < 0 else self.view(at, size, (row, 1)).double()

    def members(self, step: steps.Conv | steps.Norm | steps.LayerNorm | steps.Draw) -> Tensor:
        """The member of each row, int64 [R]."""
        runs = torch.arange(-(-step.rows // step.rows_per_member))
        if step.members >= 0:
            runs = self.view(step.members, runs.shape, (1,), torch.int64)
        return runs.repeat_interleave(step.rows_per_member)[: step.rows]

    def image(self, image: Image, num_rows: int, height: int, width: int) -> Tensor:
        """[R, C, height, width] in float64."""
        size, stride = (image.rows, height, width, image.channels), (image.row, image.y, image.x, 1)
        copies = self.view(image.at, size, stride)
        return copies[torch.arange(num_rows) % image.rows].permute(0, 3, 1, 2).double()

    def scale(self, mask: steps.Mask, num_rows: int, channels: int, height: int, width: int) -> Tensor | float:
        """What a dropout mask multiplies by, [R, C, height, width] in float64; 1 where there is none."""
        if mask.at < 0:
            return 1.0
        runs = torch.arange(-(-num_rows // mask.rows))
        if mask.members >= 0:
            runs = self.view(mask.members, runs.shape, (1,), torch.int64)
        size = (int(runs.max()) + 1, height * width, -(-channels // steps.LANES))
        words = self.view(mask.at, size, (mask.row, mask.pixel, 1), torch.int16)
        bits = (words.int()[..., None] >> torch.arange(steps.LANES) & 1).flatten(2)[..., :channels]
        kept = bits.reshape(-1, height, width, channels).permute(0, 3, 1, 2).double() * mask.scale
        return kept[runs.repeat_interleave(mask.rows)[:num_rows]]

    def joined(self, sources: Sequence[Image], num_rows: int, height: int, width: int) -> Tensor:
        """Images joined along the channels."""
        return torch.cat([self.image(s, num_rows, height, width) for s in sources if s.channels], 1)


def _activated(x: Tensor, activation: int) -> Tensor:
    return activate(x, Activation(activation).name.lower())


def _unpacked(step: steps.Conv, memory: _Memory, num_members: int, channels: int) -> Tensor:
    """The first weights [K, C_out, C_in, kernel_h, kernel_w] of a packed one."""
    tile = step.tile if isinstance(step, steps.Winograd) else None
    kernel = (step.kernel_h, step.kernel_w) if tile is None else (tile + 2, tile + 2)
    taps, padded = math.prod(kernel), -(-step.out_channels // steps.LANES) * steps.LANES
    # bfloat16 values of two input channels are in the place of one float32
    dtype, pair = (torch.bfloat16, 2) if step.bfloat16 else (torch.float32, 1)
    flat = memory.view(step.weight, (num_members, padded * taps * channels), (step.weight_member * pair, 1), dtype)
    blocks = []
    for begin in range(0, padded, step.vectors * steps.LANES):
        width = min(step.vectors * steps.LANES, padded - begin)
        block = flat[:, begin * taps * channels : (begin + width) * taps * channels]
        block = block.reshape(num_members, *kernel, channels // pair, width, pair)
        blocks.append(block.transpose(-1, -2).flatten(3, 4))
    packed = torch.cat(blocks, -1)[..., : step.out_channels].permute(0, 4, 3, 1, 2)
    return packed if tile is None else recovered(packed.double(), tile)


def _normalised(x: Tensor, step: steps.Conv | steps.Drop, memory: _Memory) -> Tensor:
    """``x`` [R, C, h, w] under the step's tables, where it has some."""
    size = (step.rows, x.shape[1])
    scale, shift = memory.rows(step.table_scale, size[1], size), memory.rows(step.table_shift, size[1], size)
    return x if scale is None or shift is None else x * scale[:, :, None, None] + shift[:, :, None, None]


def _conv(step: steps.Conv, memory: _Memory) -> None:
    members = memory.members(step)
    num_members = int(members.max()) + 1
    height, width = -(-step.in_h // step.up), -(-step.in_w // step.up)
    x = memory.joined(step.sources, step.rows, height, width)  # [R, C_in, h, w]
    channels = x.shape[1]
    x = _activated(_normalised(x, step, memory), step.act_in)
    x = x * memory.scale(step.mask_in, step.rows, channels, height, width)
    x = x.repeat_interleave(step.up, 2).repeat_interleave(step.up, 3)[:, :, : step.in_h, : step.in_w]
    weight = _unpacked(step, memory, num_members, channels)
    if step.bfloat16:
        x = x.bfloat16()
    bottom = (step.out_h - 1) * step.stride_h + step.kernel_h - step.pad_top - step.in_h
    right = (step.out_w - 1) * step.stride_w + step.kernel_w - step.pad_left - step.in_w
    x = F.pad(x.double(), (step.pad_left, right, step.pad_top, bottom))
    stride = (step.stride_h, step.stride_w)
    y = torch.cat(
        [F.conv2d(row, weight[k].double(), stride=stride) for row, k in zip(x.split(1), members, strict=True)]
    )
    bias = memory.rows(step.bias, step.bias_member, (num_members, step.out_channels))
    if bias is not None:
        y = y + bias[members][:, :, None, None]
    vector = memory.rows(step.row_vector, step.row_vector_row, (step.rows, step.out_channels))
    if vector is not None:
        y = y + vector[:, :, None, None]
    y = y * memory.scale(step.mask_out, step.rows, step.out_channels, step.out_h, step.out_w)
    if step.residual.at >= 0:
        y = y + memory.image(step.residual, step.rows, step.out_h, step.out_w)
    y = _activated(y * step.scale / step.divisor, step.act_out)
    out, size = step.out, (step.rows, step.out_h, step.out_w, step.out_channels)
    memory.view(out.at, size, (out.row, out.y, out.x, 1)).copy_(y.permute(0, 2, 3, 1))


def _affine(step: steps.Norm | steps.LayerNorm, memory: _Memory, channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift [R, C] of what is normalised: by member, then by row."""
    members, size = memory.members(step), (step.rows, channels)
    num_members = int(members.max()) + 1
    scale, shift = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    weight = memory.rows(step.weight, channels, (num_members, channels))
    bias = memory.rows(step.bias, channels, (num_members, channels))
    if weight is not None:
        scale = scale * weight[members]
    if bias is not None:
        shift = shift + bias[members]
    row_scale = memory.rows(step.row_scale, step.row_scale_row, size)
    row_shift = memory.rows(step.row_shift, step.row_shift_row, size)
    if row_scale is not None:
        scale, shift = scale * (1 + row_scale), shift * (1 + row_scale)
    if row_shift is not None:
        shift = shift + row_shift
    return scale, shift


def _norm(step: steps.Norm, memory: _Memory) -> None:
    x = memory.joined(step.sources, step.rows, step.height, step.width)  # [R, C, height, width]
    channels = x.shape[1]
    groups = x.reshape(step.rows, step.groups, -1)
    mean = groups.mean(-1).repeat_interleave(channels // step.groups, 1)  # [R, C]
    rate = (groups.var(-1, correction=0) + step.eps).rsqrt().repeat_interleave(channels // step.groups, 1)
    scale, shift = _affine(step, memory, channels)
    size, stride = (step.rows, channels), (channels, 1)
    memory.view(step.out_scale, size, stride).copy_(rate * scale)
    memory.view(step.out_shift, size, stride).copy_(shift - mean * rate * scale)


def _layer_norm(step: steps.LayerNorm, memory: _Memory) -> None:
    size = (step.rows, step.tokens, step.channels)
    x = memory.view(step.source, size, (step.source_row, step.source_token, 1)).double()
    scale, shift = _affine(step, memory, step.channels)
    y = F.layer_norm(x, (step.channels,), eps=step.eps) * scale[:, None] + shift[:, None]
    memory.view(step.out, size, (step.out_row, step.out_token, 1)).copy_(y)


def _attention(step: steps.Attention, memory: _Memory) -> None:
    def view(heads: steps.Heads, tokens: int, width: int) -> Tensor:
        size, stride = (step.rows, step.heads, tokens, width), (heads.row, heads.head, heads.token, heads.channel)
        return memory.view(heads.at, size, stride)

    q, k = view(step.q, step.queries, step.width).double(), view(step.k, step.keys, step.width).double()
    v = view(step.v, step.keys, step.value_width).double()
    scores = (q @ k.transpose(-1, -2) * step.scale).softmax(-1)
    view(step.out, step.queries, step.value_width).copy_(scores @ v)


@functools.cache
def _dtype(code: int) -> torch.dtype:
    return next(dtype for dtype, each in steps.DTYPES.items() if each == code)


def _pointwise(step: steps.Pointwise, memory: _Memory) -> None:
    operands = step.inputs[: step.num_inputs]
    sources = [memory.view(x.at, step.sizes, x.strides, _dtype(x.dtype)) for x in operands]
    code = [int(word) for word in step.instructions[: 2 * step.num_instructions : 2]]
    numbers = step.instructions[1 : 2 * step.num_instructions : 2]
    out = memory.view(step.out.at, step.sizes, step.out.strides, _dtype(step.out.dtype))
    if code == [int(Opcode.COPY)] and sources[0].dtype == out.dtype:  # integers beyond float32 stay what they are
        out.copy_(sources[0])
        return
    # of their own, because strides of 0 in dimensions of 1 mislead torch's gelu
    registers = [torch.empty(step.sizes).copy_(x) for x in sources]
    for word, number in zip(code, numbers, strict=True):
        a, b = registers[word >> 16 & 0xFFFF], registers[word >> 32 & 0xFFFF]
        registers.append(instructed(Opcode(word & 0xFFFF), a, b, number).float())
    out.copy_(registers[-1])


def _draw(step: steps.Draw, memory: _Memory) -> None:
    key, evaluation = (int(memory.view(at, (), (), torch.int64)) for at in (step.key, step.evaluation))
    samples = memory.view(step.samples, (step.rows,), (1,), torch.int64)
    pixels, channels = torch.arange(step.pixels)[:, None], torch.arange(step.channels)
    elements = pixels * step.pixel_step + channels * step.channel_step  # [pixels, C]
    ones = torch.ones(step.rows, int(elements.max()) + 1)
    p = step.threshold / 2**32
    kept = dropout(ones, memory.members(step), samples, p, key, evaluation)[:, elements] > 0
    words = -(-step.channels // steps.LANES)
    bits = F.pad(kept.int(), (0, words * steps.LANES - step.channels)).unflatten(-1, (words, steps.LANES))
    size, stride = (step.rows, step.pixels, words), (step.out_row, step.out_pixel, 1)
    memory.view(step.out, size, stride, torch.int16).copy_((bits << torch.arange(steps.LANES)).sum(-1))


def _drop(step: steps.Drop, memory: _Memory) -> None:
    x = memory.joined(step.sources, step.rows, step.height, step.width)
    y = _activated(_normalised(x, step, memory), step.activation)
    y = y * memory.scale(step.mask, step.rows, x.shape[1], step.height, step.width)
    out, size = step.out, (step.rows, step.height, step.width, x.shape[1])
    memory.view(out.at, size, (out.row, out.y, out.x, 1)).copy_(y.permute(0, 2, 3, 1))


def _gather(step: steps.Gather, memory: _Memory) -> None:
    members = memory.view(step.members, (step.rows,), (1,), torch.int64)
    table = memory.view(step.table, (int(members.max()) + 1, step.count), (step.count, 1))
    memory.view(step.out, (step.rows, step.count), (step.count, 1)).copy_(table[members])


_RUNS: dict[type, Callable[..., None]] = {
    steps.Conv: _conv,
    steps.Winograd: _conv,
    steps.Norm: _norm,
    steps.Pointwise: _pointwise,
    steps.LayerNorm: _layer_norm,
    steps.Attention: _attention,
    steps.Draw: _draw,
    steps.Drop: _drop,
    steps.Gather: _gather,
}
