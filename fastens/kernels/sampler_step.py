"""Triton kernel of a sampler's step: state and outputs are read once, and noise is drawn where it is added.

The formulae are those of ``fastens/reference/sampler_step.py``.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._normal import normal_at
from fastens.kernels._tiles import cdiv

TILE = 512  # elements of a program


@kernel
def sampler_step_kernel(
    x, output, second, y, table, seed, draws, samples, numel, draw_step, tiles, low, high,
    KIND: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of a sample."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    element = pid % tiles * TILE + tl.arange(0, TILE)
    mask = element < numel
    at = row * numel + element
    state = tl.load(x + at, mask, other=0.0).to(WIDE)
    found = tl.load(output + at, mask, other=0.0).to(WIDE)
    if KIND == "corrected":
        value = tl.load(table + 2) * state + tl.load(table + 3) * found
        value += tl.load(table + 4) * tl.load(second + at, mask, other=0.0).to(WIDE)
    elif KIND == "linear":
        value = tl.load(table) * state + tl.load(table + 1) * found
    else:
        value = tl.load(table + 3) * state + tl.load(table + 4) * found
        value = tl.where(value < low, low, tl.where(value > high, high, value))  # NaN stays
        if KIND == "clipped":
            value = tl.load(table) * state + tl.load(table + 1) * value
    if samples is not None:
        drawn = normal_at(element, tl.load(seed), tl.load(draws + row * draw_step), tl.load(samples + row))
        value += tl.load(table + 2) * drawn.to(WIDE)
    tl.store(y + at, value.to(y.dtype.element_ty), mask)


def sampler_step(
    x: Tensor,
    output: Tensor,
    second: Tensor | None,
    row: Tensor,
    kind: str,
    low: float,
    high: float,
    seed: Tensor | None,
    offset: Tensor | None,
    samples: Tensor | None,
) -> Tensor:
    """Take the step; the arguments are those of ``fastens::sampler_step``."""
    x, output = x.contiguous(), output.contiguous()
    second = None if second is None else second.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    numel = x[0].numel()
    tiles = cdiv(numel, TILE)
    several = 0 if offset is None else int(offset.numel() > 1)
    with device_of(x).current():
        sampler_step_kernel[(len(x) * tiles,)](
            x, output, second, y, row.contiguous(), seed, None if offset is None else offset.contiguous(),
            None if samples is None else samples.contiguous(), numel, several, tiles, low, high, KIND=kind,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, TILE=TILE,
        )  # fmt: skip
    return y
