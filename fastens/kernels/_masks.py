"""Triton kernels of dropout masks as bits: they are drawn for each row, and applied to an image.

Bit c % 32 of word c // 32 of a place is whether channel c is kept there, as :mod:`fastens.kernels._dropout` draws it.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._dropout import mask_scale
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._tiles import cdiv, next_power_of_2

WORD = 32  # channels of a word
PLACES = 32  # of a program that draws
TOGETHER = 64  # masks of one launch: a pointer and five numbers each, of the 4096 bytes that a launch may hand over
TILE = 1024  # elements of a program that applies bits


@kernel
def draw_bits_kernel(
    bits, drawn, keys, places_of, channels_of, steps_of, first_programs, members, samples, rows_per_member, programs,
    MASKS_DRAWN: tl.constexpr, ALONG: tl.constexpr, MASKS: tl.constexpr, THRESHOLD: tl.constexpr, WORD: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """One word of PLACES places of a row of one mask; four elements, ALONG places or channels, are drawn at once.

    Each row has ``programs`` programs, those of one mask after the other; ``steps_of`` is how far a mask's lines are
    apart in the numbers of elements.
    """
    wait_for_previous()
    pid = tl.program_id(0)
    row, own = (pid // programs).to(tl.int64), pid % programs
    to, which, first = bits[0], keys[0] + own * 0, own * 0
    places, channels, step = places_of[0] + own * 0, channels_of[0] + own * 0, steps_of[0] + row * 0
    for i in tl.static_range(1, MASKS_DRAWN):
        here = own >= first_programs[i]
        to = tl.where(here, bits[i], to)
        which = tl.where(here, keys[i], which)
        first = tl.where(here, first_programs[i], first)
        places = tl.where(here, places_of[i], places)
        channels = tl.where(here, channels_of[i], channels)
        step = tl.where(here, steps_of[i], step)
    words = tl.cdiv(channels, WORD)
    word, tile = (own - first) % words, (own - first) // words
    member = row // rows_per_member
    if members is not None:
        member = tl.load(members + row)
    sample = tl.load(samples + row) + 1
    key = tl.load(drawn + 1 + which)
    key_low, key_high, evaluation = key.to(tl.int32), (key >> 32).to(tl.int32), tl.load(drawn).to(tl.int32)
    place = tile * PLACES + tl.arange(0, PLACES)
    of_word = tl.arange(0, WORD)
    if ALONG == "places":
        line = (word * WORD + of_word)[:, None].to(tl.int64) * step + tile * PLACES
        kept = mask_scale(
            line, member, sample, evaluation, key_low, key_high, PLACES, MASKS, THRESHOLD, 1.0, tl.float32
        )
        value = tl.sum((kept > 0).to(tl.int32) << of_word[:, None], 0)
    else:
        line = place[:, None].to(tl.int64) * step + word * WORD
        kept = mask_scale(line, member, sample, evaluation, key_low, key_high, WORD, MASKS, THRESHOLD, 1.0, tl.float32)
        value = tl.sum((kept > 0).to(tl.int32) << of_word[None, :], 1)
    tl.store(to + (row * places + place) * words + word, value, place < places)


def draw_bits(
    bits: Sequence[Tensor],
    drawn: Tensor,
    keys: Sequence[int],
    members: Tensor | None,
    samples: Tensor,
    rows_per_member: int,
    threshold: int,
    channels: Sequence[int],
    steps: Sequence[tuple[int, int]],
) -> None:
    """Draw the bits of what dropouts of the same rows keep, as few launches.

    Args:
        bits: of each dropout int32 [R, places, words], contiguous, written.
        drawn: int64 [1 + n] on the device, the evaluation's number and the keys of all dropouts.
        keys: which of them is each dropout's.
        members: int64 [R]; none for ``row // rows_per_member``.
        samples: int64 [R].
        rows_per_member: where there are no members.
        threshold: an element is dropped whose 32 random bits are below it.
        channels: C of each dropout.
        steps: of each dropout, the number of an element in its row is place * step[0] + channel * step[1]; one is 1.
    """
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (own, (of_place, of_channel)) in enumerate(zip(bits, steps, strict=True)):
        along, line = ("places", of_channel) if of_place == 1 else ("channels", of_place)
        if own.numel():
            alike[along, "blocks" if line % 4 == 0 else "elements"].append(i)  # lines begin at multiples of it
    for (along, kind), numbers in alike.items():
        for start in range(0, len(numbers), TOGETHER):
            some = numbers[start : start + TOGETHER]
            counts = [cdiv(bits[i].shape[1], PLACES) * bits[i].shape[2] for i in some]
            firsts = [0, *itertools.accumulate(counts)]
            with device_of(drawn).current():
                draw_bits_kernel[(bits[some[0]].shape[0] * firsts[-1],)](
                    tuple(bits[i] for i in some), drawn, tuple(keys[i] for i in some),
                    tuple(bits[i].shape[1] for i in some), tuple(channels[i] for i in some),
                    tuple(steps[i][1] if along == "places" else steps[i][0] for i in some), tuple(firsts[:-1]),
                    members, samples, rows_per_member, firsts[-1], MASKS_DRAWN=len(some), ALONG=along, MASKS=kind,
                    THRESHOLD=min(threshold, 2**32 - 1), WORD=WORD, PLACES=PLACES, num_warps=1,
                )  # fmt: skip


@kernel
def apply_bits_kernel(
    out, x, bits, rows_per_mask, channels, height, width, words, channel_tiles, place_tiles, out_r, out_c, out_y,
    out_x, x_r, x_c, x_y, x_x,
    SCALE: tl.constexpr, WORD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_S places of a row."""
    wait_for_previous()
    pid = tl.program_id(0)
    channel = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    place = pid // channel_tiles % place_tiles * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    row = (pid // channel_tiles // place_tiles).to(tl.int64)
    mask = (channel < channels) & (place < height * width)
    at = ((row // rows_per_mask) * (height * width) + place) * words + channel // WORD
    kept = (tl.load(bits + at, mask, other=0) >> channel % WORD) & 1
    y, x_ = (place // width).to(tl.int64), (place % width).to(tl.int64)
    channel = channel.to(tl.int64)
    value = tl.load(x + row * x_r + channel * x_c + y * x_y + x_ * x_x, mask, other=0.0).to(WIDE)
    value *= kept.to(WIDE) * SCALE  # by a product: what is no number stays it
    tl.store(out + row * out_r + channel * out_c + y * out_y + x_ * out_x, value.to(out.dtype.element_ty), mask)


def apply_bits(x: Tensor, bits: Tensor, scale: float, into: Tensor) -> Tensor:
    """Write x [R, C, H, W], what is not kept as zero and the rest times ``scale``, to ``into``, of any strides.

    Args:
        x: the image.
        bits: int32 [R or K, H, W, words], of each row or of each of K equal groups of rows, contiguous.
        scale: of what is kept.
        into: where it is written.

    Returns:
        ``into``.
    """
    rows, channels, height, width = into.shape
    if into.numel() == 0:
        return into
    block_c = min(256, next_power_of_2(channels))
    block_s = min(max(1, TILE // block_c), next_power_of_2(height * width))
    channel_tiles, place_tiles = cdiv(channels, block_c), cdiv(height * width, block_s)
    with device_of(into).current():
        apply_bits_kernel[(rows * channel_tiles * place_tiles,)](
            into, x, bits, rows // bits.shape[0], channels, height, width, bits.shape[-1], channel_tiles, place_tiles,
            *into.stride(), *x.stride(), SCALE=scale, WORD=WORD, BLOCK_C=block_c, BLOCK_S=block_s,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=max(1, block_c * block_s // 256),
        )  # fmt: skip
    return into
