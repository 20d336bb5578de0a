"""Which convolutions run in Winograd's squares, by what they are expected to cost."""

from __future__ import annotations

import dataclasses

from fastens.plan.cpu.tiling import Shape
from fastens.program.steps import LANES
from fastens.program.winograd import TILES

# Fitted to steps of 16 to 256 channels at 4x4 to 32x32, K = 5, B = 1 to 16, and to three whole U-Nets, whose large
# weights come from memory, on two cores of an EPYC of 2024 (AVX-512); bench/bench_conv_step.py measures steps again.
_PRODUCTS = 120  # multiply-adds of a thread in a nanosecond
_MOVED, _TRANSFORMED = 0.25, 0.7  # nanoseconds of a thread for a channel of a pixel, of the input and of the output
_CACHED_BYTES = 2**22  # of a stack of weights that the next pass finds in a cache
_FROM_CACHE, _FROM_MEMORY = 100, 20  # bytes of weights in a nanosecond, for all threads
_TILE = 8  # rows of a matrix product are filled up to so many, about
_WORTH = {2: 0.9, 4: 0.8}  # of the time, to take 16/9 or 4 times the memory for weights
_USUAL = 8, 2  # rows of a member, and threads: the choice for them is within some percent of the best for 1 to 64 rows


def squares_of(shape: Shape, num_threads: int, by_one_row: bool = False) -> int:
    """Pixels on a side of the squares that a convolution is computed in, 0 where the direct way is as good.

    Larger squares save products (9, 4 or 2.25 for a pixel and a pair of channels) and take more weights (9, 16 or 36
    for the pair), which count where few pixels share them.

    Args:
        shape: of the convolution.
        num_threads: that share it.
        by_one_row: whether rows and threads are taken to be those of ``_USUAL``, so that they do not change last bits.
    """
    if by_one_row:
        members = 1 if shape.given else shape.share[0]  # a row has one
        rows, num_threads = _USUAL
        shape = dataclasses.replace(shape, rows=members * rows, rows_of_run=rows, given=False)
    if shape.kernel != (3, 3) or shape.stride != (1, 1):
        return 0
    best = 0
    for squares in TILES:
        if cost(shape, squares, num_threads) < _WORTH[squares] * cost(shape, best, num_threads):
            best = squares
    return best


def cost(shape: Shape, squares: int, num_threads: int) -> float:
    """Expected nanoseconds of a 3x3 convolution of stride 1."""
    side, taps = (squares, (squares + 2) ** 2) if squares else (1, 9)
    members, rows = shape.share
    tiles = rows * -(-shape.height // side) * -(-shape.width // side)  # of a member
    channels, out_channels = (-(-n // LANES) * LANES for n in (shape.channels, shape.out_channels))
    products = members * -(-tiles // _TILE) * _TILE * taps * shape.channels * out_channels
    moved = members * tiles * side**2 * (channels + out_channels) * (_TRANSFORMED if squares else _MOVED)
    kernels = min(members, shape.members) * shape.channels * shape.out_channels
    bandwidth = _FROM_CACHE if 4 * 9 * kernels <= _CACHED_BYTES else _FROM_MEMORY
    return (products / _PRODUCTS + moved) / num_threads + 4 * taps * kernels / bandwidth
