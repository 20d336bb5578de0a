"""Triton kernel of attention without mask that writes into strided memory, for 16-bit numbers.

out = softmax(scale q k^T) v, with the softmax taken along as keys are read (Dao et al., "FlashAttention", arXiv
2205.14135), in float32.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv, next_power_of_2

LARGEST = 256  # channels of a head


@kernel
def attention_kernel(
    q, k, v, out, heads, queries, keys, width, value_width, tiles, scale,
    q_r, q_h, q_t, q_c, k_r, k_h, k_t, k_c, v_r, v_h, v_t, v_c, out_r, out_h, out_t, out_c,
    WIDENED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one row; ``scale`` has the factor log2(e) in it."""
    wait_for_previous()
    pid = tl.program_id(0).to(tl.int64)
    head, row = pid // tiles % heads, pid // tiles // heads
    query = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    at = q + row * q_r + head * q_h + query[:, None] * q_t + channel[None, :] * q_c
    own = tl.load(at, (query < queries)[:, None] & (channel < width)[None, :], other=0.0).to(out.dtype.element_ty)
    if WIDENED:
        own = own.to(tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    k += row * k_r + head * k_h
    v += row * v_r + head * v_h
    for start in range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = key < keys
        b = tl.load(
            k + key[None, :] * k_t + channel[:, None] * k_c, exists[None, :] & (channel < width)[:, None], other=0.0
        ).to(out.dtype.element_ty)
        c = tl.load(
            v + key[:, None] * v_t + value_channel[None, :] * v_c,
            exists[:, None] & (value_channel < value_width)[None, :],
            other=0.0,
        ).to(out.dtype.element_ty)
        if WIDENED:
            b, c = b.to(tl.float32), c.to(tl.float32)
        scores = tl.dot(own, b, out_dtype=tl.float32) * scale
        scores = tl.where(exists[None, :], scores, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        powers = tl.exp2(scores - largest[:, None])
        kept = tl.exp2(before - largest)
        total = total * kept + tl.sum(powers, 1)
        acc = tl.dot(powers.to(c.dtype), c, acc * kept[:, None], out_dtype=tl.float32)
    at = out + row * out_r + head * out_h + query[:, None] * out_t + value_channel[None, :] * out_c
    mask = (query < queries)[:, None] & (value_channel < value_width)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, into: Tensor) -> Tensor:
    """Attend, without mask.

    Args:
        q: [R, heads, queries, width].
        k: [R, heads, keys, width], of one key or more.
        v: [R, heads, keys, value width].
        scale: by which the scores are multiplied.
        into: [R, heads, queries, value width], float16 or bfloat16, of any strides; products are taken in its dtype.

    Raises:
        ValueError: heads of more channels than a tile holds, or another dtype.
    """
    if not takes(q, v, into):
        raise ValueError(f"attention: {list(q.shape)} and {list(v.shape)} into {into.dtype} {list(into.shape)}")
    if into.numel() == 0:
        return into
    rows, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    block_d, block_v = (max(16, next_power_of_2(n)) for n in (width, value_width))
    block_m = min(64, max(16, next_power_of_2(queries)))
    while block_m > 16 and rows * heads * cdiv(queries, block_m) < device_of(into).multiprocessors:
        block_m //= 2
    block_n = min(32 if max(block_d, block_v) > 128 else 64, max(16, next_power_of_2(keys)))
    tiles = cdiv(queries, block_m)
    with device_of(into).current():
        attention_kernel[(rows * heads * tiles,)](
            q, k, v, into, heads, queries, keys, width, value_width, tiles, scale * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), *into.stride(),
            WIDENED=into.dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=block_v, num_warps=4, num_stages=2,
        )  # fmt: skip
    return into


def takes(q: Tensor, v: Tensor, into: Tensor) -> bool:
    """Whether the kernel is made for such heads and numbers."""
    return into.dtype.itemsize == 2 and max(q.shape[3], v.shape[3]) <= LARGEST and v.shape[2] > 0
