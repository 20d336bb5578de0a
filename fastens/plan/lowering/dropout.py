"""Lowering of dropout: fixed masks are constants, fresh ones are drawn by a step; other steps apply them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastens.ops.dropout import dropout
from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.elementwise import relaid
from fastens.plan.lowering.registry import image_pixels, lowers, pending
from fastens.plan.lowering.values import Convolved, Dropped, Mask, Pixels, Runs, pixels_of
from fastens.plan.memory import At, or_none
from fastens.program import steps
from fastens.trace.record import Node, NotLowerable, Ref

_DRAW_GRAIN = 4096  # elements that are worth a task


@lowers("fastens.dropout")
def drop(emitter: Emitter, node: Node) -> bool:
    """Dropout, on the way out of the convolution before where one has it to itself, else on the way into a step."""
    x, members, samples, p, key = node.args[:5]
    out = node.outs[0]
    if len(node.args) > 6 and node.args[6] != "none":
        raise NotLowerable("an activation inside of a dropout")
    if x.dtype not in emitter.floats or not 2 <= len(x.size) <= 4 or not x.numel:
        if samples is None:
            return False
        raise NotLowerable(f"fresh masks of {list(x.size)}, {x.dtype}")
    before = pending(emitter, x)
    for dim in (1, -1):
        result = pixels_of(out, dim)
        if result is None:
            continue
        whole = before is None or before.weight.shape[1] == result.channels
        inner = pixels_of(x, dim)
        if not whole or (inner is None and dim == 1):
            continue
        mask = _mask(emitter, node, result, dim % len(x.size), members, samples, p, key)
        if before is not None and _is_linear(before) and relaid(before, out):
            before.mask = mask
            emitter.values[out.storage] = before
            return True
        inner = image_pixels(emitter, x, dim)
        if inner is None:
            raise NotLowerable(f"dropout of {list(x.size)}, {list(x.stride)}")
        emitter.values[out.storage] = Dropped(result, inner, mask)
        return True
    raise NotLowerable(f"dropout of {list(x.size)}, {list(x.stride)}")


def _is_linear(before: Convolved) -> bool:
    """Whether nothing was taken into a convolution that comes behind a mask."""
    nothing = before.mask is None and before.residual is None and not before.scaled
    return nothing and before.activation is steps.Activation.NONE


def _mask(
    emitter: Emitter, node: Node, pixels: Pixels, dim: int, members: Ref, samples: Ref | None, p: float, key: int
) -> Mask:
    threshold, scale = round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0
    if threshold == 0:
        raise NotLowerable(f"a dropout of {p}")
    size = node.args[0].size
    channel_step = math.prod(size[dim + 1 :])
    pixel_step = 1 if dim == 1 and len(size) > 2 else size[-1]
    count, words = pixels.height * pixels.width, -(-pixels.channels // steps.LANES)
    runs = _runs(emitter, members)
    if samples is None:
        constant = emitter.constant(members)
        masks = emitter.recording.masks
        if constant is not None:
            num_members = int(constant.max()) + 1
        elif masks is not None:
            num_members = masks.num_members
        else:
            raise NotLowerable("masks of members that are not known")
        elements = (count, pixels.channels, pixel_step, channel_step)
        identity = ("mask", key, p, num_members, *elements)
        bits = _fixed(num_members, math.prod(size[1:]), p, key, *elements)
        return Mask(emitter.constants.add(identity, bits), count * words, words, runs, scale)
    inputs = emitter.recording.masks
    if inputs is None or inputs.drawn is None or key not in inputs.keys:
        raise NotLowerable("fresh masks that are the same in every pass")
    drawn = emitter.stored(inputs.drawn)
    bits = At(emitter.buffer(-(-pixels.rows * count * words // 2)))
    per_row = count * words * steps.LANES
    splits = max(1, min(-(-count // 4), per_row // _DRAW_GRAIN, -(-3 * emitter.num_threads // pixels.rows)))
    emitter.add(
        steps.Draw(
            pixels.rows,
            runs.rows,
            splits,
            count,
            pixels.channels,
            pixel_step,
            channel_step,
            drawn.plus(1 + inputs.keys[key], 8),
            drawn,
            emitter.stored(samples),
            threshold,
            bits,
            count * words,
            words,
            or_none(runs.members),
            tasks=pixels.rows * splits,
        )
    )
    return Mask(bits, count * words, words, Runs(1), scale)


def _runs(emitter: Emitter, members: Ref) -> Runs:
    """Which rows are whose: ``members`` int64 [R] of the recorded pass, or of every call."""
    constant = emitter.constant(members)
    if constant is None:
        return Runs(1, emitter.stored(members))
    each = max(1, int((constant == 0).sum()))
    if torch.equal(constant, torch.arange(len(constant)) // each):
        return Runs(each)
    return Runs(1, emitter.constants.add(("members", members), constant.contiguous().view(torch.float32), constant))


def _fixed(
    num_members: int, size: int, p: float, key: int, pixels: int, channels: int, pixel_step: int, channel_step: int
) -> Tensor:
    """The bits of the masks of all members, as float32."""
    kept = dropout(torch.ones(num_members, size), torch.arange(num_members), None, p, key) > 0
    kept = kept.as_strided((num_members, pixels, channels), (size, pixel_step, channel_step))
    kept = torch.nn.functional.pad(kept.int(), (0, -channels % steps.LANES)).unflatten(-1, (-1, steps.LANES))
    words = (kept << torch.arange(steps.LANES)).sum(-1).to(torch.int16).flatten()
    return torch.nn.functional.pad(words, (0, len(words) % 2)).view(torch.float32)
