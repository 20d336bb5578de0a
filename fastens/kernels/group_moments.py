"""Launcher of the kernel of :mod:`fastens.kernels.group_norm` that takes the moments of spans."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._into import strided_images
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.kernels.group_norm import SECTOR, partial_kernel
from fastens.reference import group_moments as reference
from fastens.reference.group_moments import SPAN, counts

LARGEST = 32768  # elements of a tile; groups of more channels than fit with a span are left to the reference


def group_moments(x: Tensor, num_groups: int, into: Tensor | None = None) -> Tensor:
    """Take the moments; the arguments are those of ``fastens::group_moments``, ``into`` is where they are written."""
    rows, channels = x.shape[:2]
    space, per_group = x.shape[2:].numel(), channels // num_groups
    padded = next_power_of_2(per_group)
    if padded * SPAN > LARGEST:
        moments = reference.group_moments(x, num_groups)
        return moments if into is None else into.copy_(moments)
    wide = torch.promote_types(x.dtype, torch.float32)
    spans = len(counts(space))
    moments = into
    if moments is None:
        moments = torch.empty(rows, num_groups, spans, 2, dtype=wide, device=x.device)
    if moments.numel() == 0:
        return moments
    x, strides = strided_images(x, copy=True)
    bundled = 1
    if strides[1] == 1 and padded == per_group:  # neighbouring groups in one tile, as wide as memory transactions
        while bundled < num_groups and bundled * per_group * x.element_size() < 2 * SECTOR:
            bundled *= 2
    bundles = cdiv(num_groups, bundled)
    with device_of(x).current():
        partial_kernel[(rows * bundles * spans,)](
            x, moments, channels, num_groups, space, bundles, *strides,
            CG=per_group, NG=bundled, PADDED_CG=padded, SPAN=SPAN, SPANS=spans,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            num_warps=max(1, min(16, SPAN * bundled * padded // 1024)),
        )  # fmt: skip
    return moments
