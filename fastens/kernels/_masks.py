"""Triton kernels of dropout masks as bits: they are drawn for each row, and applied to an image.

Bit c % 32 of word c // 32 of a place is whether channel c is kept there, as :mod:`fastens.kernels._dropout` draws it.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.kernels._dropout import mask_scale

WORD = 32  # channels of a word
PLACES = 32  # of a program that draws
TILE = 1024  # elements of a program that applies bits


@triton.jit(do_not_specialize=["which"])
def draw_bits_kernel(
    bits, drawn, which, members, samples, rows_per_member, places, channels, words, of_place, of_channel,
    ALONG: tl.constexpr, MASKS: tl.constexpr, THRESHOLD: tl.constexpr, WORD: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """One word of PLACES places of a row; four elements, ALONG places or channels, are drawn at once."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(places, PLACES)
    word, tile = pid % words, pid // words % tiles
    row = (pid // words // tiles).to(tl.int64)
    member = row // rows_per_member
    if members is not None:
        member = tl.load(members + row)
    sample = tl.load(samples + row) + 1
    key = tl.load(drawn + 1 + which)
    key_low, key_high, evaluation = key.to(tl.int32), (key >> 32).to(tl.int32), tl.load(drawn).to(tl.int32)
    place = tile * PLACES + tl.arange(0, PLACES)
    of_word = tl.arange(0, WORD)
    if ALONG == "places":
        first = (word * WORD + of_word)[:, None].to(tl.int64) * of_channel + tile * PLACES
        kept = mask_scale(
            first, member, sample, evaluation, key_low, key_high, PLACES, MASKS, THRESHOLD, 1.0, tl.float32
        )  # fmt: skip
        value = tl.sum((kept > 0).to(tl.int32) << of_word[:, None], 0)
    else:
        first = place[:, None].to(tl.int64) * of_place + word * WORD
        kept = mask_scale(
            first, member, sample, evaluation, key_low, key_high, WORD, MASKS, THRESHOLD, 1.0, tl.float32
        )  # fmt: skip
        value = tl.sum((kept > 0).to(tl.int32) << of_word[None, :], 1)
    tl.store(bits + (row * places + place) * words + word, value, place < places)


def draw_bits(
    bits: Tensor,
    drawn: Tensor,
    which: int,
    members: Tensor | None,
    samples: Tensor,
    rows_per_member: int,
    threshold: int,
    channels: int,
    steps: tuple[int, int],
) -> Tensor:
    """Draw the bits of what dropout keeps.

    Args:
        bits: int32 [R, places, words], contiguous, written.
        drawn: int64 [1 + n] on the device, the evaluation's number and the keys of all dropouts.
        which: whose key it is.
        members: int64 [R]; none for ``row // rows_per_member``.
        samples: int64 [R].
        rows_per_member: where there are no members.
        threshold: an element is dropped whose 32 random bits are below it.
        channels: C.
        steps: the number of an element in its row is place * steps[0] + channel * steps[1]; one of them is 1.

    Returns:
        ``bits``.
    """
    rows, places, words = bits.shape
    if bits.numel() == 0:
        return bits
    along = "places" if steps[0] == 1 else "channels"
    line = steps[1] if along == "places" else steps[0]  # every line begins at a multiple of it
    with torch.cuda.device(bits.device if bits.is_cuda else -1):
        draw_bits_kernel[(rows * triton.cdiv(places, PLACES) * words,)](
            bits, drawn, which, members, samples, rows_per_member, places, channels, words, *steps, ALONG=along,
            MASKS="blocks" if line % 4 == 0 else "elements", THRESHOLD=min(threshold, 2**32 - 1), WORD=WORD,
            PLACES=PLACES, num_warps=1,
        )  # fmt: skip
    return bits


@triton.jit
def apply_bits_kernel(
    out, x, bits, rows_per_mask, channels, height, width, words, channel_tiles, place_tiles, out_r, out_c, out_y,
    out_x, x_r, x_c, x_y, x_x,
    SCALE: tl.constexpr, WORD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_S places of a row."""
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
    block_c = min(256, triton.next_power_of_2(channels))
    block_s = min(max(1, TILE // block_c), triton.next_power_of_2(height * width))
    channel_tiles, place_tiles = triton.cdiv(channels, block_c), triton.cdiv(height * width, block_s)
    with torch.cuda.device(into.device if into.is_cuda else -1):
        apply_bits_kernel[(rows * channel_tiles * place_tiles,)](
            into, x, bits, rows // bits.shape[0], channels, height, width, bits.shape[-1], channel_tiles, place_tiles,
            *into.stride(), *x.stride(), SCALE=scale, WORD=WORD, BLOCK_C=block_c, BLOCK_S=block_s,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=max(1, block_c * block_s // 256),
        )  # fmt: skip
    return into
