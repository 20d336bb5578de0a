"""Triton kernel of many member-batched linear layers that read the same vectors, in one launch.

y_i[r] = act(x[r] W_ik^T + b_ik) for layer i and the rows r of member k; the sums are in float32, or float64 for
float64. Weights are read where they are: the kernel has a pointer to each layer's, and each program finds its layer.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import itertools

import torch
import triton.language as tl
from torch import Tensor

from fastens.device import device_of, product_precision
from fastens.kernels._activation import activated
from fastens.kernels._into import strided_vectors
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._rows import interpreting
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.kernels.linear import tiles

LAYERS = 64  # of one launch: three pointers and five numbers each, of the 4096 bytes that a launch may hand over
FEW_ROWS = 4  # of a member: up to here reading the weights is the work, and tensor cores would multiply padding
FEW_TILE = 4096  # weights that a program of few rows holds at a time: 64 bytes a thread in 16-bit


@kernel
def linear_group_kernel(
    x, weights, biases, ys, first_tiles, outputs_of, strides_of, weight_strides, bias_strides, rows_per_member,
    x_stride, inputs, row_tiles, tiles,
    BIASED: tl.constexpr, LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    WIDENED: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's result for one member; each layer has its tiles one after the other.

    ``strides_of`` are between vectors of the results, ``weight_strides`` and ``bias_strides`` between members.
    """
    wait_for_previous()
    pid = tl.program_id(0)
    tile_m, tile, member = pid % row_tiles, (pid // row_tiles) % tiles, (pid // row_tiles // tiles).to(tl.int64)
    weight, bias, y = weights[0], biases[0], ys[0]
    weight_k, bias_k = weight_strides[0] + member * 0, bias_strides[0] + member * 0
    first, outputs, stride, biased = tile * 0, outputs_of[0] + tile * 0, strides_of[0] + member * 0, BIASED % 2 == 1
    for i in tl.static_range(1, LAYERS):
        here = tile >= first_tiles[i]
        weight = tl.where(here, weights[i], weight)
        bias = tl.where(here, biases[i], bias)
        y = tl.where(here, ys[i], y)
        weight_k = tl.where(here, weight_strides[i], weight_k)
        bias_k = tl.where(here, bias_strides[i], bias_k)
        first = tl.where(here, first_tiles[i], first)
        outputs = tl.where(here, outputs_of[i], outputs)
        stride = tl.where(here, strides_of[i], stride)
        biased = tl.where(here, (BIASED >> i) % 2 == 1, biased)
    own = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = own < rows_per_member
    row = member * rows_per_member + own
    column = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_member = weight + member * weight_k
    wide_column = column.to(tl.int64)
    if FEW:
        depth = tl.arange(0, BLOCK_K)[None, None, :]
        parts = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], WIDE)
        for start in range(0, inputs, BLOCK_K):
            inside = start + depth < inputs
            b = tl.load(
                of_member + wide_column[None, :, None] * inputs + (start + depth),
                inside & (column < outputs)[None, :, None],
                other=0.0,
            )
            a = tl.load(x + row[:, None, None] * x_stride + (start + depth), inside & exists[:, None, None], other=0.0)
            parts += a.to(b.dtype).to(WIDE) * b.to(WIDE)
        acc = tl.sum(parts, 2)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
        for start in range(0, inputs, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            inside = depth < inputs
            a = tl.load(x + row[:, None] * x_stride + depth[None, :], exists[:, None] & inside[None, :], other=0.0)
            b = tl.load(
                of_member + wide_column[None, :] * inputs + depth[:, None],
                inside[:, None] & (column < outputs)[None, :],
                other=0.0,
            )
            a = a.to(b.dtype)
            if WIDENED:
                a, b = a.to(WIDE), b.to(WIDE)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
    added = tl.load(bias + member * bias_k + column, (column < outputs) & biased, other=0.0)
    acc = activated(acc + added.to(WIDE)[None, :], ACTIVATION)
    mask = exists[:, None] & (column < outputs)[None, :]
    tl.store(y + row[:, None] * stride + column[None, :], acc.to(y.dtype.element_ty), mask)


def linear_group(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    activation: str = "none",
    into: list[Tensor] | None = None,
) -> list[Tensor]:
    """Apply each member's layers; the arguments are those of ``fastens::linear_group``.

    ``into`` is where the results are written: tensors [R, ..., O_i] whose vectors are equally far apart. An x of
    another dtype than the weights is rounded to theirs as it is read.
    """
    num_members, _, inputs = weights[0].shape
    dtype = weights[0].dtype
    x, x_stride = strided_vectors(x, copy=True)
    sizes = [w.shape[1] for w in weights]
    ys = into
    if ys is None:
        ys = [x.new_empty(*x.shape[:-1], size, dtype=dtype) for size in sizes]
    rows = x.shape[:-1].numel() // num_members
    if rows == 0:
        return ys
    of_layer = {i: bias if bias.stride(1) == 1 else bias.contiguous() for i, bias in zip(biased, biases, strict=True)}
    stacks = [w if (*w.stride(),)[1:] == (inputs, 1) else w.contiguous() for w in weights]
    layers = [(w, of_layer.get(i), y) for i, (w, y) in enumerate(zip(stacks, ys, strict=True)) if y.numel()]
    block_m, block_n, block_k, num_warps, num_stages = tiles(rows, max(sizes), dtype)
    few = rows <= FEW_ROWS
    if few:
        block_m = next_power_of_2(rows)
        block_k = max(16, min(512 // dtype.itemsize, next_power_of_2(inputs)))
        block_n = max(1, min(FEW_TILE // (block_k * max(2, block_m)), next_power_of_2(max(sizes))))
        num_warps, num_stages = 4, 1
    row_tiles = cdiv(rows, block_m)
    wide = dtype == torch.float64
    tf32 = dtype == torch.float32 and product_precision() == "tf32"
    with device_of(x).current():
        for start in range(0, len(layers), LAYERS):
            stacks, added, outs = zip(*layers[start : start + LAYERS], strict=True)
            outputs = tuple(w.shape[1] for w in stacks)
            last = list(itertools.accumulate(cdiv(n, block_n) for n in outputs))
            linear_group_kernel[(num_members * last[-1] * row_tiles,)](
                x, stacks, tuple(w if b is None else b for w, b in zip(stacks, added, strict=True)), outs,
                (0, *last[:-1]), outputs, tuple(strided_vectors(y)[1] for y in outs),
                tuple(w.stride(0) for w in stacks), tuple(0 if b is None else b.stride(0) for b in added),
                rows, x_stride, inputs, row_tiles, last[-1],
                BIASED=sum(1 << i for i, b in enumerate(added) if b is not None), LAYERS=len(stacks),
                ACTIVATION=activation, PRECISION="tf32" if tf32 else "ieee", WIDE=tl.float64 if wide else tl.float32,
                WIDENED=dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
                FEW=few, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    return ys
