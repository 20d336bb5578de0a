"""Triton kernel of counter-based dropout and the activation before it, in any dense layout.

y = act(x) * m / (1 - p), m in {0, 1} a function of key, member, sample, evaluation and element, as in
``fastens/reference/dropout.py``.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._activation import activated
from fastens.kernels._dropout import VARYING, mask_scale, mask_settings, of_rows
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.kernels.group_norm import channels_last, dense

TILE = 1024  # elements of a program


@kernel(do_not_specialize=VARYING)
def dropout_kernel(
    x, y, members, samples, channels, space, stride_c, stride_s, bundles, spans, evaluation, key_low, key_high,
    LINES: tl.constexpr, SPAN: tl.constexpr, MASKS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of a row: LINES channels times SPAN places."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    span, bundle, row = pid % spans, (pid // spans) % bundles, pid // spans // bundles
    channel = bundle * LINES + tl.arange(0, LINES)[:, None]
    place = span * SPAN + tl.arange(0, SPAN)[None, :]
    mask = (channel < channels) & (place < space)
    offs = row * channels * space + channel * stride_c + place * stride_s
    member = tl.load(members + row)
    sample = member * 0
    if samples is not None:
        sample = tl.load(samples + row) + 1
    value = activated(tl.load(x + offs, mask, other=0.0).to(WIDE), ACTIVATION)
    first = channel * space + span * SPAN
    if MASKS != "none":
        value *= mask_scale(first, member, sample, evaluation, key_low, key_high, SPAN, MASKS, THRESHOLD, SCALE, WIDE)
    tl.store(y + offs, value.to(y.dtype.element_ty), mask)


def dropout(
    x: Tensor,
    members: Tensor,
    samples: Tensor | None,
    p: float,
    key: int,
    evaluation: int,
    activation: str = "none",
) -> Tensor:
    """Activate and drop; the arguments are those of ``fastens::dropout``. The result has the layout of x."""
    x = dense(x) if x.ndim > 1 else x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows, count = x.shape[0], x[0].numel()
    channels, space, stride_c, stride_s = 1, count, count, 1
    if x.ndim > 2 and channels_last(x):
        channels = x.shape[1]
        space, stride_c, stride_s = count // channels, 1, channels
    lines = min(64, next_power_of_2(channels))
    span = max(4, min(TILE // lines, next_power_of_2(space)))
    bundles, spans = cdiv(channels, lines), cdiv(space, span)
    line = space if channels > 1 else 4  # a single line begins at 0
    with device_of(x).current():
        dropout_kernel[(rows * bundles * spans,)](
            x, y, *of_rows(1.0, members, samples, x.device), channels, space, stride_c, stride_s, bundles, spans,
            **mask_settings(p, key, evaluation, samples is not None, line), LINES=lines, SPAN=span,
            ACTIVATION=activation, WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            num_warps=max(1, min(4, lines * span // 256)),
        )  # fmt: skip
    return y
