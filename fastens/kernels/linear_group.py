"""Triton kernel of many member-batched linear layers that read the same vectors, in one launch.

y_i[r] = act(x[r] W_ik^T + b_ik) for layer i and the rows r of member k; the sums are in float32, or float64 for
float64. Weights are read where they are: the kernel has a pointer to each layer's, and each program finds its layer.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.kernels._activation import activated
from fastens.kernels._into import strided_vectors
from fastens.kernels._rows import interpreting
from fastens.kernels.linear import tiles

LAYERS = 64  # of one launch: three pointers each, of the 4096 bytes that a launch may hand over
FEW_ROWS = 4  # of a member: up to here reading the weights is the work, and tensor cores would multiply padding
FEW_TILE = 4096  # weights that a program of few rows holds at a time: 64 bytes a thread in 16-bit


@triton.jit
def linear_group_kernel(
    x, weights, biases, ys, first_tiles, outputs_of, held_of, strides_of, rows_per_member, x_stride, inputs,
    row_tiles, tiles,
    BIASED: tl.constexpr, LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    WIDENED: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's result for one member; each layer has its tiles one after the other."""
    pid = tl.program_id(0)
    tile_m, tile, member = pid % row_tiles, (pid // row_tiles) % tiles, (pid // row_tiles // tiles).to(tl.int64)
    weight, bias, y = weights[0], biases[0], ys[0]
    first, outputs, stride, biased = tile * 0, outputs_of[0] + tile * 0, strides_of[0] + member * 0, BIASED % 2 == 1
    held = held_of[0] + member * 0
    for i in tl.static_range(1, LAYERS):
        here = tile >= first_tiles[i]
        weight = tl.where(here, weights[i], weight)
        bias = tl.where(here, biases[i], bias)
        y = tl.where(here, ys[i], y)
        first = tl.where(here, first_tiles[i], first)
        outputs = tl.where(here, outputs_of[i], outputs)
        held = tl.where(here, held_of[i], held)
        stride = tl.where(here, strides_of[i], stride)
        biased = tl.where(here, (BIASED >> i) % 2 == 1, biased)
    own = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = own < rows_per_member
    row = member * rows_per_member + own
    column = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_member = weight + member * held * inputs
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
            parts += a.to(WIDE) * b.to(WIDE)
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
            if WIDENED:
                a, b = a.to(WIDE), b.to(WIDE)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
    added = tl.load(bias + member * held + column, (column < outputs) & biased, other=0.0)
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

    ``into`` is where the results are written: tensors [R, ..., O_i] whose vectors are equally far apart.
    """
    num_members, _, inputs = weights[0].shape
    x, x_stride = strided_vectors(x, copy=True)
    sizes = [w.shape[1] for w in weights]
    ys = into
    if ys is None:
        ys = [x.new_empty(*x.shape[:-1], size) for size in sizes]
    rows = x.shape[:-1].numel() // num_members
    if rows == 0:
        return ys
    of_layer = dict(zip(biased, biases, strict=True))
    layers = [
        (*_stacks(w, of_layer.get(i)), y, strided_vectors(y)[1])
        for i, (w, y) in enumerate(zip(weights, ys, strict=True))
        if y.numel()
    ]
    block_m, block_n, block_k, num_warps, num_stages = tiles(rows, max(sizes), x.dtype)
    few = rows <= FEW_ROWS
    if few:
        block_m = triton.next_power_of_2(rows)
        block_k = max(16, min(512 // x.element_size(), triton.next_power_of_2(inputs)))
        block_n = max(1, min(FEW_TILE // (block_k * max(2, block_m)), triton.next_power_of_2(max(sizes))))
        num_warps, num_stages = 4, 1
    row_tiles = triton.cdiv(rows, block_m)
    wide = x.dtype == torch.float64
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with torch.cuda.device(x.device if x.is_cuda else -1):
        for start in range(0, len(layers), LAYERS):
            stacks, added, held, outs, strides = zip(*layers[start : start + LAYERS], strict=True)
            outputs = tuple(w.shape[1] for w in stacks)
            last = list(itertools.accumulate(triton.cdiv(n, block_n) for n in outputs))
            linear_group_kernel[(num_members * last[-1] * row_tiles,)](
                x, stacks, tuple(w if b is None else b for w, b in zip(stacks, added, strict=True)), outs,
                (0, *last[:-1]), outputs, held, strides, rows, x_stride, inputs, row_tiles, last[-1],
                BIASED=sum(1 << i for i, b in enumerate(added) if b is not None), LAYERS=len(stacks),
                ACTIVATION=activation, PRECISION="tf32" if tf32 else "ieee", WIDE=tl.float64 if wide else tl.float32,
                WIDENED=x.dtype == torch.bfloat16 and interpreting(),  # the interpreter multiplies bfloat16's bits
                FEW=few, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    return ys


def _stacks(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Weights [K, O, C] and biases [K, O] of a layer, and how many outputs a member's are behind another's.

    They may be some of the outputs of a larger layer; anything else is copied.
    """
    held, rest = divmod(weight.stride(0), weight.shape[2])
    lines = weight.stride()[1:] == (weight.shape[2], 1) and not rest
    if lines and (bias is None or bias.stride() == (held, 1)):
        return weight, bias, held
    return weight.contiguous(), None if bias is None else bias.contiguous(), weight.shape[1]
