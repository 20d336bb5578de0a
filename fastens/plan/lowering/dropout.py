"""Lowering of dropout: fixed masks are constants, fresh ones are drawn by a node; other nodes apply them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastens.ops.dropout import dropout
from fastens.plan.graph import Draw, Mask, Runs, View
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.fusion import mask_in_epilogue
from fastens.plan.lowering.registry import image_pixels, lowers, pending
from fastens.plan.lowering.values import Dropped, Pixels, pixels_of
from fastens.plan.memory import Constant
from fastens.trace.record import NotLowerable, Operation, Ref

_WORDS = {16: torch.int16, 32: torch.int32}


@lowers("fastens.dropout")
def drop(builder: Builder, op: Operation) -> bool:
    """Dropout, on the way out of the convolution before where one has it to itself, else on the way into a node."""
    x, members, samples, p, key = op.args[:5]
    out = op.outs[0]
    if len(op.args) > 6 and op.args[6] != "none":
        raise NotLowerable("an activation inside of a dropout")
    if x.dtype not in builder.target.floats or not 2 <= len(x.size) <= 4 or not x.numel:
        if samples is None:
            return False
        raise NotLowerable(f"fresh masks of {list(x.size)}, {x.dtype}")
    before = pending(builder, x)
    for dim in (1, -1):
        result = pixels_of(out, dim)
        if result is None:
            continue
        whole = before is None or before.weight.shape[1] == result.channels
        inner = pixels_of(x, dim)
        if not whole or (inner is None and dim == 1):
            continue
        mask = _mask(builder, op, result, dim % len(x.size), members, samples, p, key)
        if mask_in_epilogue(builder, out, x, mask):
            return True
        inner = image_pixels(builder, x, dim, moved=True)
        if inner is None:
            raise NotLowerable(f"dropout of {list(x.size)}, {list(x.stride)}")
        builder.values[out.storage] = Dropped(result, inner, mask)
        return True
    raise NotLowerable(f"dropout of {list(x.size)}, {list(x.stride)}")


def _mask(
    builder: Builder, op: Operation, pixels: Pixels, dim: int, members: Ref, samples: Ref | None, p: float, key: int
) -> Mask:
    threshold, scale = round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0
    if threshold == 0:
        raise NotLowerable(f"a dropout of {p}")
    size = op.args[0].size
    channel_step = math.prod(size[dim + 1 :])
    pixel_step = 1 if dim == 1 and len(size) > 2 else size[-1]
    count, words = pixels.height * pixels.width, -(-pixels.channels // builder.target.mask_lanes)
    runs = _runs(builder, members)
    if samples is None:
        constant = builder.constant(members)
        masks = builder.recording.masks
        if constant is not None:
            num_members = int(constant.max()) + 1
        elif masks is not None:
            num_members = masks.num_members
        else:
            raise NotLowerable("masks of members that are not known")
        elements = (count, pixels.channels, pixel_step, channel_step)
        bits = _fixed(num_members, math.prod(size[1:]), p, key, *elements, builder.target.mask_lanes)
        kept = Constant(("mask", key, p, num_members, *elements), bits.to(builder.device), None)
        return Mask(View(kept, 0, tuple(bits.shape), tuple(bits.stride())), runs, scale)
    inputs = builder.recording.masks
    if inputs is None or inputs.drawn is None or key not in inputs.keys:
        raise NotLowerable("fresh masks that are the same in every pass")
    word = _WORDS[builder.target.mask_lanes]
    drawn = builder.stored(inputs.drawn)
    bits = View(
        builder.buffer(pixels.rows * count * words, word), 0, (pixels.rows, count, words), (count * words, words, 1)
    )
    builder.add(
        Draw([bits], drawn, [inputs.keys[key]], runs.members, builder.stored(samples), runs.rows, threshold,
             [pixels.channels], [(pixel_step, channel_step)])
    )  # fmt: skip
    return Mask(bits, Runs(1), scale)


def _runs(builder: Builder, members: Ref) -> Runs:
    """Which rows are whose: ``members`` int64 [R] of the recorded pass, or of every call."""
    constant = builder.constant(members)
    if constant is None:
        return Runs(1, builder.stored(members))
    each = max(1, int((constant == 0).sum()))
    if torch.equal(constant, torch.arange(len(constant)) // each):
        return Runs(each)
    return Runs(1, View(Constant(("members", members), constant, constant), 0, members.size, (1,)))


def _fixed(
    num_members: int, size: int, p: float, key: int, pixels: int, channels: int, pixel_step: int, channel_step: int,
    lanes: int,
) -> Tensor:  # fmt: skip
    """The bits of the masks of all members, [K, pixels, words] of integers of ``lanes`` bits."""
    kept = dropout(torch.ones(num_members, size), torch.arange(num_members), None, p, key) > 0
    kept = kept.as_strided((num_members, pixels, channels), (size, pixel_step, channel_step))
    kept = torch.nn.functional.pad(kept.long(), (0, -channels % lanes)).unflatten(-1, (-1, lanes))
    return (kept << torch.arange(lanes)).sum(-1).to(_WORDS[lanes])
