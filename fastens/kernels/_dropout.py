"""Dropout masks in Triton kernels: words of Philox4x32-10 at (element // 4, member, sample + 1, evaluation)."""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a kernel's launch must not be compiled anew for.
VARYING = ["evaluation", "key_low", "key_high"]


@triton.jit
def words_at(block, member, sample, evaluation, key_low, key_high):
    """The four words of each block of four elements; the other counters broadcast."""
    zero = (block * 0).to(tl.uint32)
    return tl.philox_impl(
        block.to(tl.uint32),
        zero + member.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + evaluation.to(tl.uint32, bitcast=True),
        key_low.to(tl.uint32, bitcast=True),
        key_high.to(tl.uint32, bitcast=True),
    )


@triton.jit
def mask_scale(
    first, member, sample, evaluation, key_low, key_high, LENGTH: tl.constexpr, MASKS: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Zero or 1 / (1 - p) [lines, LENGTH] for elements ``first`` [lines, 1] and those that follow.

    MASKS is ``blocks`` where every line begins at a multiple of four, so that four elements share one call of Philox,
    or ``elements``.
    """
    if MASKS == "blocks":
        block = first // 4 + tl.arange(0, LENGTH // 4)[None, :]
        a, b, c, d = words_at(block, member, sample, evaluation, key_low, key_high)
        bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        element = first + tl.arange(0, LENGTH)[None, :]
        a, b, c, d = words_at(element // 4, member, sample, evaluation, key_low, key_high)
        which = element % 4
        bits = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
    return (bits >= THRESHOLD).to(WIDE) * SCALE


def mask_settings(p: float, key: int, evaluation: int, fresh: bool, line: int) -> dict[str, Any]:
    """What a kernel is told of its masks.

    Args:
        p: the probability that an element is dropped.
        key: 64 bits.
        evaluation: counts only where masks are fresh.
        fresh: whether masks depend on sample and evaluation.
        line: every line of a tile begins at a multiple of this many elements.
    """
    return {
        "key_low": _signed(key),
        "key_high": _signed(key >> 32),
        "evaluation": _signed(evaluation) if fresh else 0,
        "MASKS": "none" if p == 0 else "blocks" if line % 4 == 0 else "elements",
        "THRESHOLD": min(round(p * 2**32), 2**32 - 1),  # at p = 1 the scale is 0 anyway
        "SCALE": 1 / (1 - p) if p < 1 else 0.0,
    }


def of_rows(
    p: float, members: Tensor | None, samples: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Members and samples of the rows on the device, none where nothing is dropped."""
    if p == 0 or members is None:
        return None, None
    return members.to(device, non_blocking=True), None if samples is None else samples.to(device, non_blocking=True)


def _signed(bits: int) -> int:
    """The lower 32 bits as the integer that a kernel takes for an int32."""
    return (bits + 2**31) % 2**32 - 2**31
