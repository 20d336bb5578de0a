"""Triton kernel that puts images one after the other along the channels, each pixel once or more in both directions."""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._tiles import cdiv, next_power_of_2

TILE = 1024  # elements of a program


@kernel
def concatenate_kernel(
    out, images, firsts, strides, channels, height, width, channel_tiles, place_tiles, out_r, out_c, out_y, out_x,
    UP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_S places; image i has channels firsts[i] to firsts[i + 1] and four strides."""
    wait_for_previous()
    pid = tl.program_id(0)
    channel = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    place = pid // channel_tiles % place_tiles * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    row = (pid // channel_tiles // place_tiles).to(tl.int64)
    mask = (channel < channels) & (place < height * width)
    y, x = place // width, place % width
    own_y, own_x = (y // UP).to(tl.int64), (x // UP).to(tl.int64)
    channel, y, x = channel.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    value = tl.zeros([BLOCK_C, BLOCK_S], out.dtype.element_ty)
    for i in tl.static_range(len(images)):
        own = (channel >= firsts[i]) & (channel < firsts[i + 1])
        at = images[i] + row * strides[4 * i] + (channel - firsts[i]) * strides[4 * i + 1]
        at += own_y * strides[4 * i + 2] + own_x * strides[4 * i + 3]
        value = tl.where(own, tl.load(at, mask & own, other=0.0).to(out.dtype.element_ty), value)
    tl.store(out + row * out_r + channel * out_c + y * out_y + x * out_x, value, mask)


def join(images: Sequence[Tensor], up: int, into: Tensor) -> Tensor:
    """Write images [R, C_i, H, W] to ``into`` [R, sum of C_i, up H, up W], of any strides."""
    if into.numel() == 0:
        return into
    rows, channels, height, width = into.shape
    firsts = (0, *itertools.accumulate(image.shape[1] for image in images))
    strides = sum((image.stride() for image in images), ())
    # along what is contiguous in the result
    if into.stride(1) == 1:
        block_c = min(256, next_power_of_2(channels))
        block_s = min(TILE // block_c, next_power_of_2(height * width))
    else:
        block_s = min(256, next_power_of_2(height * width))
        block_c = min(TILE // block_s, next_power_of_2(channels))
    channel_tiles, place_tiles = cdiv(channels, block_c), cdiv(height * width, block_s)
    with device_of(into).current():
        concatenate_kernel[(rows * channel_tiles * place_tiles,)](
            into, tuple(images), firsts, strides, channels, height, width, channel_tiles, place_tiles, *into.stride(),
            UP=up, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=max(1, block_c * block_s // 256),
        )  # fmt: skip
    return into
