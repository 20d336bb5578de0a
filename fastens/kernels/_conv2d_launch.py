"""How convolutions are launched: the norm before them, and how they are cut into tiles and splits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._conv2d import maps_kernel
from fastens.kernels._counters import counters
from fastens.kernels._rows import members_of_rows
from fastens.kernels._tiles import next_power_of_2
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN

JOINED_PARTS = 16  # moments of a group that every tile joins for itself; more are joined once, by a kernel before
MAP_TILE = 2048  # moments that are joined at a time; half of it beside the sums of more columns than these
COLUMNS = 128
STEPS_PER_SPLIT = 4  # a split of a sum is at least as long
MOST_SPLITS = 32
JOINED_AFTER = 1 << 16  # bytes that a program loads while the last split waits for the memory that they meet in


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a kernel is told of the norm before a convolution: tensors, channels of moments' and norm's groups."""

    tensors: tuple[Tensor | None, ...]
    per_group: int
    per_norm: int
    constants: dict[str, Any]

    @classmethod
    def prepare(cls, block: ConvBlock, tiles: Tiles) -> Norm:
        """Hand the moments on, or where they are many of a group, join them first into a map per row and channel."""
        before, x, num_members = block.prologue, block.x, len(block.weight)
        moments, eps = before.moments, before.eps
        if moments is None:
            return cls((None,) * 7, 1, 1, {"eps": eps, "SPANS": 1, "PARTS": 1, "PADDED_PARTS": 1, "BLOCK": 1})
        rows, x_channels, *space = x.shape
        skip_channels = 0 if before.skip is None else before.skip.shape[1]
        channels = x_channels + skip_channels
        _, groups, spans, _ = moments.shape
        per_group, per_norm = x_channels // groups, channels // (before.norm_groups or groups)
        parts = per_norm // per_group * spans
        padded = next_power_of_2(parts)
        by_tile = parts <= JOINED_PARTS
        most = MAP_TILE // 2 if by_tile and tiles.block_n > COLUMNS else MAP_TILE
        width = max(16, most // (padded * tiles.rows)) if by_tile else max(1, most // padded)
        width = min(512, next_power_of_2(channels), width)
        constants = {"eps": eps, "SPANS": spans, "PARTS": parts, "PADDED_PARTS": padded, "BLOCK": width}
        maps = moments.new_empty(rows, 3, channels)
        given = (moments, before.skip_moments, before.norm_weight, before.norm_bias, before.scale, before.shift)
        tensors = (maps, *(None if t is None else t.contiguous() for t in given))
        if by_tile:
            return cls(tensors, per_group, per_norm, constants)
        maps_kernel[(rows,)](
            *tensors, members_of_rows(block.offsets, num_members, rows, x.device), rows, max(1, rows // num_members),
            channels, skip_channels, per_group, per_norm, space[0] * space[1], SPAN, **constants,
            WIDE=tl.float64 if moments.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
        return cls((maps,) + (None,) * 6, per_group, per_norm, constants)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a convolution is cut: rows and places of a tile, its output channels, channels of a step, and the launch."""

    rows: int
    places: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int

    def blocks(self, sources: tuple[int, ...]) -> int:
        """How many blocks of channels x, and skip, are taken in; an empty one where there are no channels."""
        return max(1, sum(-(-channels // self.block_k) for channels in sources))

    def evenness(
        self, x: Tensor, sources: tuple[int, ...], y: Tensor, weight: Tensor, stride: Sequence[int]
    ) -> dict[str, Any]:
        """What a kernel need not ask: whether blocks of channels are whole, and offsets within a tile of 32 bits."""
        height, width = x.shape[2:]
        lines = stride[0] * (self.places // y.shape[3] + 2) if self.rows == 1 else self.rows * height
        _, weight_o, weight_c, _, _ = weight.stride()
        farthest = max(lines * width * max(sources), self.block_n * weight_o + self.block_k * weight_c)
        return {
            "EVEN_K": any(sources) and all(channels % self.block_k == 0 for channels in sources),
            "EVEN_N": y.shape[1] % self.block_n == 0,
            "OFFSET": tl.int32 if farthest < 2**31 else tl.int64,
        }

    def meeting(self, tiles: int, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Memory in which the splits of a tile meet, and a counter for each tile; none where sums are not split."""
        return meeting(self.splits, tiles, self.rows * self.places * self.block_n, y)


def tiles_for(
    x: Tensor, groups_of_rows: int, rows: int, space: int, outputs: int, sources: tuple[int, ...], taps: int,
    per_group: int, tiling: str = "auto", sums: int = 1, normed: bool = False,
) -> Tiles:  # fmt: skip
    """Tile sizes for a shape: of one row's places where they suffice, else of several rows; splits where few result.

    Args:
        x: of the dtype, and on the device.
        groups_of_rows: members that have rows of their own in the result.
        rows: the most rows of one of them.
        space: places of the output in a row.
        outputs: channels.
        sources: channels of x, and of skip.
        taps: of the kernel.
        per_group: output channels whose moments are wanted, so that a tile holds whole spans, and whole groups where
            these are powers of two; 0 for no moments.
        tiling: ``"auto"``; ``"wide"``, twice as many output channels a tile and whole sums; ``"narrow"``, half of
            both places and channels.
        sums: how many members are summed into one result.
        normed: whether the input is normalised as it is read, in registers, of which a thread of eight warps has room
            for its part of 128 places beside the sums.
    """
    return _cut(
        x.dtype.itemsize, device_of(x).multiprocessors, MOST_SPLITS, groups_of_rows, rows, space, outputs, sources,
        taps, per_group, tiling, sums, normed,
    )  # fmt: skip


def moved(steps: int, splits: int, of_step: int, of_part: int) -> int:
    """Bytes that the last of so many splits waits for: its own steps' loads, and the parts that meet."""
    own = -(-steps // splits) * of_step
    return own if splits == 1 else own + JOINED_AFTER + (splits + 1) * of_part


def whole(steps: int, splits: int) -> int:
    """How many splits there are where each but the last has as many steps, and none is empty."""
    return -(-steps // -(-steps // splits))


def splits_of(programs: int, steps: int, of_step: int, of_part: int, device: torch.device) -> int:
    """Into how many splits the sums of so many programs are cut, so that none waits long: one where they fill a GPU."""
    most = min(MOST_SPLITS, device_of(device).multiprocessors // programs, max(1, steps // STEPS_PER_SPLIT))
    best = min(range(1, most + 1), key=lambda splits: moved(steps, splits, of_step, of_part), default=1)
    return whole(steps, best)


def meeting(splits: int, tiles: int, size: int, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where splits of so many tiles of y meet: memory for parts of ``size`` sums, and counters; none of one split."""
    if splits == 1:
        return None, None
    workspace = y.new_empty(tiles * splits * size, dtype=torch.promote_types(y.dtype, torch.float32))
    return workspace, counters(tiles, y)


@functools.lru_cache(maxsize=4096)
def _cut(
    itemsize: int, available: int, most_splits: int, groups_of_rows: int, rows: int, space: int, outputs: int,
    sources: tuple[int, ...], taps: int, per_group: int, tiling: str, sums: int, normed: bool,
) -> Tiles:  # fmt: skip
    narrow, wide = tiling == "narrow", tiling == "wide"
    places = min(SPAN // 2 if narrow and not per_group else SPAN, next_power_of_2(space))
    together = max(min(SPAN // places, next_power_of_2(rows)), 16 // places, 1)
    if narrow and together > 1:
        together = max(together // 2, 16 // places, 1)
    size = together * places
    block_n = min(256 if wide else 64 if narrow else 128, max(16, next_power_of_2(outputs)))
    block_k = min(64, max(16, next_power_of_2(max(sources))))
    num_stages = 3
    if itemsize == 4:
        block_n, block_k = min(block_n, 128 if wide else 64), min(block_k, 32)
    elif itemsize == 8:
        block_n, block_k, num_stages = min(block_n, 32), 16, 1
    tiles = groups_of_rows * -(-rows // together) * -(-space // places)
    steps = sums * taps * sum(-(-channels // block_k) for channels in sources)
    splits = 1
    if tiles * -(-outputs // block_n) * 2 <= available and not wide:
        ways = {}
        in_tile = per_group <= block_n and not per_group & (per_group - 1)
        fewest = max(16, per_group) if in_tile else 16
        while block_n >= fewest:
            most = min(most_splits, available // (tiles * -(-outputs // block_n)), max(1, steps // STEPS_PER_SPLIT))
            for splits in range(1, most + 1):
                cost = moved(steps, splits, (size + block_n) * block_k * itemsize, size * block_n * max(4, itemsize))
                ways.setdefault(cost, (block_n, whole(steps, splits)))
            block_n //= 2
        block_n, splits = ways[min(ways)]
    large = size >= 128 if itemsize > 2 or (normed and size >= 128) else size * block_n >= 16384
    return Tiles(together, places, block_n, block_k, 8 if large else 4, num_stages, splits)
