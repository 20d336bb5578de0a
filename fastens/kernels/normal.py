"""Triton kernel of counter-based Gaussian noise, as defined in ``fastens/reference/normal.py``."""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._normal import normal_at
from fastens.kernels._tiles import cdiv

TILE = 512  # elements of a program


@kernel
def normal_kernel(y, seed, draws, samples, numel, draw_step, tiles, TILE: tl.constexpr):
    """One tile of a sample."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    element = pid % tiles * TILE + tl.arange(0, TILE)
    drawn = normal_at(element, tl.load(seed), tl.load(draws + row * draw_step), tl.load(samples + row))
    tl.store(y + row * numel + element, drawn, element < numel)


def normal(seed: Tensor, offset: Tensor, samples: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw; the arguments are those of ``fastens::normal``."""
    y = torch.empty((len(samples), *shape), dtype=torch.float32, device=samples.device)
    numel = math.prod(shape)
    if y.numel() == 0:
        return y
    tiles = cdiv(numel, TILE)
    with device_of(y).current():
        normal_kernel[(len(samples) * tiles,)](
            y, seed, offset.contiguous(), samples.contiguous(), numel, int(offset.numel() > 1), tiles, TILE=TILE
        )
    return y
