"""How convolutions are launched: the norm before them, and how they are cut into tiles and splits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.kernels._conv2d import maps_kernel
from fastens.kernels._rows import members_of_rows
from fastens.reference.group_moments import SPAN

JOINED_PARTS = 16  # moments of a group that every tile joins for itself; more are joined once, by a kernel before
MAP_TILE = 1024  # moments that are joined at a time
STEPS_PER_SPLIT = 4  # a split of a sum is at least as long
MOST_SPLITS = 32
MULTIPROCESSORS = 132  # of an H100 or H200, where there is no device to ask


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a kernel is told of the norm before a convolution: tensors, channels of moments' and norm's groups."""

    tensors: tuple[Tensor | None, ...]
    per_group: int
    per_norm: int
    constants: dict[str, Any]

    @classmethod
    def prepare(
        cls, x: Tensor, moments: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, eps: float, offsets: Tensor | None, num_members: int, skip: Tensor | None = None,
        skip_moments: Tensor | None = None, norm_groups: int = 0,
    ) -> Norm:  # fmt: skip
        """Hand the moments on, or where they are many of a group, join them first into a map per row and channel."""
        if moments is None:
            return cls((None,) * 7, 1, 1, {"eps": eps, "SPANS": 1, "PARTS": 1, "PADDED_PARTS": 1, "BLOCK": 1})
        rows, x_channels, *space = x.shape
        skip_channels = 0 if skip is None else skip.shape[1]
        channels = x_channels + skip_channels
        _, groups, spans, _ = moments.shape
        per_group, per_norm = x_channels // groups, channels // (norm_groups or groups)
        parts = per_norm // per_group * spans
        padded = triton.next_power_of_2(parts)
        block = max(1, min(128, triton.next_power_of_2(channels), MAP_TILE // padded))
        constants = {"eps": eps, "SPANS": spans, "PARTS": parts, "PADDED_PARTS": padded, "BLOCK": block}
        maps = moments.new_empty(rows, 3, channels)
        given = (moments, skip_moments, weight, bias, scale, shift)
        tensors = (maps, *(None if t is None else t.contiguous() for t in given))
        if parts <= JOINED_PARTS:
            return cls(tensors, per_group, per_norm, constants)
        maps_kernel[(rows,)](
            *tensors, members_of_rows(offsets, num_members, rows, x.device), rows, max(1, rows // num_members),
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
        """How many blocks of channels x, and skip, are taken in."""
        return sum(-(-channels // self.block_k) for channels in sources)


def tiles_for(
    x: Tensor,
    groups_of_rows: int,
    rows: int,
    space: int,
    outputs: int,
    sources: tuple[int, ...],
    taps: int,
    whole_spans: bool,
    tiling: str = "auto",
    sums: int = 1,
) -> Tiles:
    """Tile sizes for a shape: of one row's places where they suffice, else of several rows; splits where few result.

    Args:
        x: of the dtype, and on the device.
        groups_of_rows: members that have rows of their own in the result.
        rows: the most rows of one of them.
        space: places of the output in a row.
        outputs: channels.
        sources: channels of x, and of skip.
        taps: of the kernel.
        whole_spans: moments are wanted, so that a tile holds whole spans.
        tiling: ``"auto"``; ``"wide"``, twice as many output channels a tile and whole sums; ``"narrow"``, half of
            both places and channels.
        sums: how many members are summed into one result.
    """
    narrow, wide = tiling == "narrow", tiling == "wide"
    places = min(SPAN // 2 if narrow and not whole_spans else SPAN, triton.next_power_of_2(space))
    together = max(min(SPAN // places, triton.next_power_of_2(rows)), 16 // places, 1)
    if narrow and together > 1:
        together = max(together // 2, 16 // places, 1)
    size = together * places
    block_n = min(256 if wide else 64 if narrow else 128, max(16, triton.next_power_of_2(outputs)))
    block_k = min(64, max(16, triton.next_power_of_2(max(sources))))
    num_warps, num_stages = (8 if size * block_n >= 16384 else 4), 3
    if x.dtype.itemsize == 4:
        block_n, block_k, num_stages = min(block_n, 128 if wide else 64), min(block_k, 32), 2
        num_warps = 8 if size >= 128 else 4
    elif x.dtype.itemsize == 8:
        block_n, block_k, num_stages = min(block_n, 32), 16, 1
        num_warps = 8 if size >= 128 else 4
    programs = groups_of_rows * triton.cdiv(rows, together) * triton.cdiv(space, places)
    programs *= triton.cdiv(outputs, block_n)
    steps = sums * taps * sum(triton.cdiv(channels, block_k) for channels in sources)
    available = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    most = 1 if wide else min(MOST_SPLITS, available // programs, steps // STEPS_PER_SPLIT)
    splits = 1
    while 2 * splits <= most:
        splits *= 2
    return Tiles(
        together, places, block_n, block_k, num_warps, num_stages, triton.cdiv(steps, triton.cdiv(steps, splits))
    )
