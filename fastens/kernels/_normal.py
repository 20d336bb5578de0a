"""Counter-based Gaussian noise in Triton kernels: Box and Muller's transform of Philox4x32-10's words."""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import triton
import triton.language as tl

DOMAIN = tl.constexpr(0x6E6F726D616C0000)  # as in fastens/reference/normal.py
FULL_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def normal_at(element, seed, draw, number):
    """float32 noise of elements of one sample; ``seed``, ``draw`` and ``number`` are int64 scalars.

    In float64 up to the last rounding, so that backends agree: float32 has no room for half a word's unit.
    """
    key = seed ^ DOMAIN
    zero = (element // 4 * 0).to(tl.uint32)
    a, b, c, d = tl.philox_impl(
        (element // 4).to(tl.uint32),
        zero + (draw & 0xFFFFFFFF).to(tl.uint32),
        zero + (number & 0xFFFFFFFF).to(tl.uint32),
        zero + ((number >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    lane = element % 4
    radius = (tl.where(lane < 2, a, c).to(tl.float64) + 0.5) / 4294967296.0
    angle = (tl.where(lane < 2, b, d).to(tl.float64) + 0.5) / 4294967296.0 * FULL_TURN
    return (tl.sqrt(-2.0 * tl.log(radius)) * tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))).to(tl.float32)
