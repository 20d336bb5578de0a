"""Triton kernels of aggregation: one pass over K members, with the variance and the sampler's update in the same pass.

out = a x + b s + c z,  s = rule_k(S_k), or u + g (s' - u) of the two halves of a guided batch.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels import _members
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._members import result_like
from fastens.kernels._rules import (
    beyond,
    float_parts,
    from_ordered_key,
    geometric_argument,
    larger,
    median_few,
    ordered_key,
    root,
    smaller,
    sorting_network,
)
from fastens.kernels._tiles import cdiv, next_power_of_2

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def read(ptr, offs, mask, WIDE: tl.constexpr):
    """Elements of one member, widened."""
    return tl.load(ptr + offs, mask, other=0.0).to(WIDE)


@triton.jit
def drawn_member(seed, offset, sample, num_members):
    """The member of one sample: Philox4x32-10 under key ``seed`` at counter (sample, offset)."""
    draw = offset.to(tl.int64)
    bits, _, _, _ = tl.philox(
        seed.to(tl.int64).to(tl.uint64),
        (sample & 0xFFFFFFFF).to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        (draw & 0xFFFFFFFF).to(tl.uint32),
        ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    return ((bits.to(tl.uint64) * num_members.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def shift_of(lows, sample, CHUNKS: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """``base`` and ``shift`` of the geometric mean from the smallest values [B, CHUNKS] of a sample's parts."""
    part = tl.arange(0, PADDED)
    low = tl.load(lows + sample * CHUNKS + part, part < CHUNKS, other=float("inf"))
    lowest = lowest_of(low)
    size = tl.abs(lowest)  # size - size is 0, or NaN for an infinite minimum
    return tl.where(lowest > 0, 0.0, lowest).to(WIDE), (size - tl.where(lowest > 0, 0.0, size)).to(WIDE)


@triton.jit
def lowest_of(low):
    """The smallest element of a block, NaN where one is."""
    nan = tl.max((low != low).to(tl.int32), 0)
    lowest = tl.min(tl.where(low != low, float("inf"), low), 0)
    return tl.where(nan > 0, float("nan"), lowest)


@triton.jit
def combine_few(
    ptrs, weights, base, shift, member, num_members, offs, mask,
    K: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr, AVERAGE: tl.constexpr, EPS: tl.constexpr,
    PAIRS: tl.constexpr, VARIANCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rule and variance of K members that are all held in registers."""
    result = tl.zeros_like(offs).to(WIDE)
    variance = result
    if RULE == "alternating":
        for k in tl.static_range(K):
            result += read(ptrs[k], offs, mask & (member == k), WIDE)
    if RULE != "alternating" or VARIANCE:
        v = ()
        for k in tl.static_range(K):
            v = v + (read(ptrs[k], offs, mask, WIDE),)  # noqa: RUF005 - not Python
        if RULE == "mean" or RULE == "sum":
            for k in tl.static_range(K):
                result += v[k] * tl.load(weights + k).to(WIDE) if WEIGHTED else v[k]
            if RULE == "mean" and not WEIGHTED:
                result *= 1.0 / num_members.to(WIDE)
        elif RULE == "median":
            result = median_few(v, K, PAIRS, AVERAGE)
        elif RULE == "dominant":
            result = v[0]
            for k in tl.static_range(1, K):
                result = larger(v[k], result)
        elif RULE == "max_abs":
            result = v[0]
            for k in tl.static_range(1, K):
                result = larger(v[k], result)
            result = tl.abs(result)
        elif RULE == "geometric":
            x = geometric_argument(v[0], base, shift, EPS)
            result = beyond(x)
            product, exponent = float_parts(x, WIDE)
            for k in tl.static_range(1, K):  # 16 mantissas below 2 stay below 2**16
                x = geometric_argument(v[k], base, shift, EPS)
                result += beyond(x)
                mantissa, more = float_parts(x, WIDE)
                product *= mantissa
                exponent += more
            result = ((root(product, exponent, num_members, WIDE) + result) - EPS) + (base - shift)
        if VARIANCE:
            mean = v[0]
            for k in tl.static_range(1, K):
                mean += v[k]
            mean *= 1.0 / num_members.to(WIDE)
            for k in tl.static_range(K):
                variance += (v[k] - mean) * (v[k] - mean)
            variance *= 1.0 / num_members.to(WIDE)
    return result, variance


@triton.jit
def combine_many(
    ptr, stride, weights, base, shift, member, num_members, offs, mask,
    RULE: tl.constexpr, WEIGHTED: tl.constexpr, AVERAGE: tl.constexpr, EPS: tl.constexpr,
    VARIANCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rule and variance of any number of members at equal distance, read in a loop."""
    result = tl.zeros_like(offs).to(WIDE)
    variance = result
    if RULE == "alternating":
        result = read(ptr + member * stride, offs, mask, WIDE)
    elif RULE == "mean" or RULE == "sum":
        for k in range(num_members):
            value = read(ptr + k * stride, offs, mask, WIDE)
            result += value * tl.load(weights + k).to(WIDE) if WEIGHTED else value
        if RULE == "mean" and not WEIGHTED:
            result *= 1.0 / num_members.to(WIDE)
    elif RULE == "dominant" or RULE == "max_abs":
        result = read(ptr, offs, mask, WIDE)
        for k in range(1, num_members):
            result = larger(read(ptr + k * stride, offs, mask, WIDE), result)
        if RULE == "max_abs":
            result = tl.abs(result)
    elif RULE == "geometric":
        x = geometric_argument(read(ptr, offs, mask, WIDE), base, shift, EPS)
        result = beyond(x)
        product, exponent = float_parts(x, WIDE)
        for k in range(1, num_members):
            x = geometric_argument(read(ptr + k * stride, offs, mask, WIDE), base, shift, EPS)
            result += beyond(x)
            mantissa, more = float_parts(x, WIDE)
            product, carried = float_parts(product * mantissa, WIDE)
            exponent += more + carried
        result = ((root(product, exponent, num_members, WIDE) + result) - EPS) + (base - shift)
    elif RULE == "median":
        result = median_many(ptr, stride, num_members, offs, mask, AVERAGE, WIDE)
    if VARIANCE:
        mean = tl.zeros_like(offs).to(WIDE)
        for k in range(num_members):
            mean += read(ptr + k * stride, offs, mask, WIDE)
        mean *= 1.0 / num_members.to(WIDE)
        for k in range(num_members):
            apart = read(ptr + k * stride, offs, mask, WIDE) - mean
            variance += apart * apart
        variance *= 1.0 / num_members.to(WIDE)
    return result, variance


@triton.jit
def median_many(ptr, stride, num_members, offs, mask, AVERAGE: tl.constexpr, WIDE: tl.constexpr):
    """The median of any number of members: its ordered key, bit by bit from the highest, by counting smaller keys."""
    BITS: tl.constexpr = 64 if tl.float64 == WIDE else 32
    key = ordered_key(read(ptr, offs, mask, WIDE), WIDE)
    found = key ^ key
    one = found + 1
    rank = (num_members - 1) // 2
    nan = offs < 0
    for bit in range(BITS):
        candidate = found | (one << (BITS - 1 - bit))
        below = tl.zeros_like(offs).to(tl.int32)
        for k in range(num_members):
            below += (ordered_key(read(ptr + k * stride, offs, mask, WIDE), WIDE) < candidate).to(tl.int32)
        found = tl.where(below <= rank, candidate, found)
    result = from_ordered_key(found, WIDE)
    upper = ordered_key(tl.full(offs.shape, float("inf"), WIDE), WIDE)
    up_to = tl.zeros_like(offs).to(tl.int32)
    for k in range(num_members):
        value = read(ptr + k * stride, offs, mask, WIDE)
        nan = nan | (value != value)
        key = ordered_key(value, WIDE)
        up_to += (key <= found).to(tl.int32)
        upper = tl.where((key > found) & (key < upper), key, upper)
    if AVERAGE:
        other = from_ordered_key(tl.where(up_to > num_members // 2, found, upper), WIDE)
        result = tl.where(num_members % 2 == 0, 0.5 * result + 0.5 * other, result)
    return tl.where(nan, float("nan"), result)


@kernel(do_not_specialize=["num_members"])
def smallest_kernel(
    ptrs, stride, lows, length, num_members,
    K: tl.constexpr, CHUNKS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """lows[b, c] = the smallest value of all members in part c, SPAN elements, of sample b."""
    wait_for_previous()
    part = tl.program_id(0).to(tl.int64)
    sample, start = part // CHUNKS, (part % CHUNKS) * SPAN
    low = tl.full([BLOCK], float("inf"), WIDE)
    for at in range(0, SPAN, BLOCK):
        within = start + at + tl.arange(0, BLOCK)
        mask = within < length
        offs = sample * length + within
        if K > 0:
            for k in tl.static_range(K):
                low = smaller(tl.load(ptrs[k] + offs, mask, other=float("inf")).to(WIDE), low)
        else:
            for k in range(num_members):
                low = smaller(tl.load(ptrs[0] + k * stride + offs, mask, other=float("inf")).to(WIDE), low)
    tl.store(lows + part, lowest_of(low))


@kernel(do_not_specialize=["seed", "offset", "batch", "chunks", "low_step", "num_members"])
def aggregate_kernel(
    ptrs, stride, weights, lows, out, variance_out, x, noise, coefficients, guidance,
    seed, offset, length, batch, chunks, low_step, num_members,
    K: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr, AVERAGE: tl.constexpr, EPS: tl.constexpr,
    PAIRS: tl.constexpr, LOWS: tl.constexpr, PADDED_LOWS: tl.constexpr, GUIDED: tl.constexpr,
    VARIANCE: tl.constexpr, UPDATES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of one output sample. K = 0 stands for members at equal distance, read in a loop."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // chunks
    within = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = within < length
    at = sample * length + within
    result = tl.zeros_like(at).to(WIDE)
    for half in tl.static_range(1 + GUIDED):
        row = sample + half * batch
        offs = at + half * batch * length
        base = 0.0
        shift = 0.0
        member = row
        if RULE == "geometric":
            base, shift = shift_of(lows, row * low_step, LOWS, PADDED_LOWS, WIDE)
        if RULE == "alternating":
            member = drawn_member(seed, offset, row, num_members)
        if K > 0:
            value, variance = combine_few(
                ptrs, weights, base, shift, member, num_members, offs, mask,
                K, RULE, WEIGHTED, AVERAGE, EPS, PAIRS, VARIANCE, WIDE,
            )  # fmt: skip
        else:
            value, variance = combine_many(
                ptrs[0], stride, weights, base, shift, member, num_members, offs, mask,
                RULE, WEIGHTED, AVERAGE, EPS, VARIANCE, WIDE,
            )  # fmt: skip
        if VARIANCE:
            tl.store(variance_out + offs, variance.to(variance_out.dtype.element_ty), mask)
        if half == 0:
            result = value
        else:
            result += tl.load(guidance + sample).to(WIDE) * (value - result)
    if UPDATES:
        result *= tl.load(coefficients + batch + sample).to(WIDE)
        if x is not None:
            result += tl.load(coefficients + sample).to(WIDE) * read(x, at, mask, WIDE)
        if noise is not None:
            result += tl.load(coefficients + 2 * batch + sample).to(WIDE) * read(noise, at, mask, WIDE)
    if RULE != "none":
        tl.store(out + at, result.to(out.dtype.element_ty), mask)


def launch(
    scores: list[Tensor],
    out: Tensor | None,
    variance: Tensor | None,
    rule: str,
    option: str = "",
    values: tuple[float, ...] = (),
    seed: int = 0,
    offset: int = 0,
    x: Tensor | None = None,
    noise: Tensor | None = None,
    coefficients: Tensor | None = None,
    guidance: Tensor | None = None,
) -> None:
    """Reduce ``scores`` into ``out`` and ``variance``, which have their layout; every tensor is on one device.

    Args:
        scores: K tensors [B, ...].
        out: [B, ...], or [B / 2, ...] with guidance; none with rule "none", which computes the variance alone.
        variance: [B, ...], or none.
        rule: name of the rule, or "none".
        option: the rule's choice.
        values: the rule's numbers.
        seed: of the member draw.
        offset: of the member draw.
        x: like ``out``, or none.
        noise: like ``out``, or none.
        coefficients: [3, rows of out]: a, b and c of a x + b s + c noise; none for 0, 1, 0.
        guidance: [rows of out], or none.
    """
    like = variance if out is None else out
    assert like is not None
    if scores[0].numel() == 0:
        return
    members = _members.flattened(scores, result_like(scores) if guidance is not None else like)
    ptrs, stride = _members.pointers(members)
    wide = torch.promote_types(like.dtype, torch.float32)
    tl_wide = tl.float64 if wide == torch.float64 else tl.float32
    per_sample = rule in ("geometric", "alternating") or coefficients is not None or guidance is not None
    rows = scores[0].shape[0] if per_sample else 1
    batch = rows // (1 if guidance is None else 2)
    length = scores[0].numel() // rows
    block = min(BLOCK, next_power_of_2(length))
    chunks = cdiv(length, block)
    few = len(scores) if len(scores) <= _members.UNROLLED else 0
    with device_of(like).current():
        lows, parts, low_step = None, 1, 1
        if rule == "geometric":
            lows, parts, low_step = _smallest(ptrs, stride, few, len(scores), rows, length, block, wide, option)
        aggregate_kernel[(batch * chunks,)](
            ptrs, stride, _members.on_device(values, wide, like.device) if rule in ("mean", "sum") and values else None,
            lows, out, variance, x, noise, coefficients, guidance,
            seed, offset, length, batch, chunks, low_step, len(scores),
            K=few, RULE=rule, WEIGHTED=bool(values), AVERAGE=option != "lower",
            EPS=values[0] if rule == "geometric" else 0.0,
            PAIRS=sorting_network(few) if rule == "median" else (), LOWS=parts,
            PADDED_LOWS=next_power_of_2(parts), GUIDED=int(guidance is not None), VARIANCE=variance is not None,
            UPDATES=coefficients is not None, BLOCK=block, WIDE=tl_wide, num_warps=NUM_WARPS,
        )  # fmt: skip


def _smallest(
    ptrs: tuple[Tensor, ...],
    stride: int,
    few: int,
    num_members: int,
    rows: int,
    length: int,
    block: int,
    wide: torch.dtype,
    option: str,
) -> tuple[Tensor, int, int]:
    """The smallest values [rows, parts], parts and distance of a sample's; of the whole batch in one, distance 0."""
    blocks = cdiv(length, block)
    per_part = cdiv(blocks, min(blocks, 64))  # every block of a sample reads all of its parts again
    parts = cdiv(blocks, per_part)
    lows = torch.empty(rows, parts, dtype=wide, device=ptrs[0].device)
    smallest_kernel[(rows * parts,)](
        ptrs, stride, lows, length, num_members,
        K=few, CHUNKS=parts, SPAN=per_part * block, BLOCK=block,
        WIDE=tl.float64 if wide == torch.float64 else tl.float32, num_warps=NUM_WARPS,
    )  # fmt: skip
    return (lows.amin().reshape(1, 1), 1, 0) if option == "batch" else (lows, parts, 1)


def aggregate(scores: list[Tensor], rule: str, option: str, values: list[float], seed: int, offset: int) -> Tensor:
    """Combine K scores by a rule; the arguments are those of ``fastens::aggregate``."""
    out = result_like(scores)
    launch(scores, out, None, rule, option, tuple(values), seed, offset)
    return out
