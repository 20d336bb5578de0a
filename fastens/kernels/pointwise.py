"""Triton kernel of a chain of elementwise instructions on strided operands, unrolled when it is compiled.

Registers are in float32, or float64 where an operand is; the result is rounded once, as it is stored.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastens.device import device_of
from fastens.kernels._activation import activated
from fastens.kernels._launch import kernel, wait_for_previous
from fastens.kernels._tiles import cdiv, next_power_of_2
from fastens.program.steps import Opcode
from fastens.reference.pointwise import result_dtype

SHORT = 2**31 - 1  # the largest index of 32 bits
SQUARE = 32  # elements of a side of a tile that turns its operands
TILE = 1024  # elements of a program: 16 bytes a thread of four warps in 16-bit


@triton.jit
def tanh(x, WIDE: tl.constexpr):
    """The hyperbolic tangent by the exponential, and near 0, where that cancels, by the series to x**11."""
    square = x * x
    series = 1.0 + square * (
        -1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835 + square * (-1382.0 / 155925))))
    )
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    near = 0.02 if tl.float64 == WIDE else 0.25
    return tl.where(tl.abs(x) < near, x * series, tl.where(x < 0, -far, far))


@triton.jit
def exponential(x, WIDE: tl.constexpr):
    """2**n exp(x - n log 2): Triton's own takes x / log 2 in float32, and is off by as many units as that is large."""
    if tl.float32 != WIDE:
        return tl.exp(x)
    clipped = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    n = tl.floor(tl.where(clipped == clipped, clipped, 0.0) * 1.44269504 + 0.5)  # 0 for NaN, which is no integer
    rest = (clipped - n * 0.693359375) + n * 2.12194440e-4
    whole = n.to(tl.int32)
    half = whole >> 1  # 2**n in two factors, since n reaches 128 and -150
    scale = ((half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp(rest) * scale * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def divided(x, y, WIDE: tl.constexpr):
    """The quotient rounded to nearest, as torch has it: Triton's own division of float32 is an approximation."""
    if tl.float32 == WIDE:
        x, y = tl.broadcast(x, y)
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def computed(x, y, WHICH: tl.constexpr, CODE: tl.constexpr, NUMBERS: tl.constexpr, WIDE: tl.constexpr):
    """Instruction WHICH on its operands."""
    OPCODE: tl.constexpr = CODE[WHICH]
    NUMBER: tl.constexpr = NUMBERS[WHICH]
    if OPCODE == "ADD":
        x = x + y
    elif OPCODE == "SUBTRACT":
        x = x - y
    elif OPCODE == "MULTIPLY":
        x = x * y
    elif OPCODE == "DIVIDE":
        x = divided(x, y, WIDE)
    elif OPCODE == "ADD_NUMBER":
        x = x + tl.full([1, 1], NUMBER, WIDE)
    elif OPCODE == "MULTIPLY_NUMBER":
        x = x * tl.full([1, 1], NUMBER, WIDE)
    elif OPCODE == "NUMBER_MINUS":
        x = tl.full([1, 1], NUMBER, WIDE) - x
    elif OPCODE == "NUMBER_OVER":
        x = divided(tl.full([1, 1], NUMBER, WIDE), x, WIDE)
    elif OPCODE == "DIVIDE_NUMBER":
        x = divided(x, tl.full([1, 1], NUMBER, WIDE), WIDE)
    elif OPCODE == "SILU":
        x = activated(x, "silu")
    elif OPCODE == "GELU":
        x = activated(x, "gelu")
    elif OPCODE == "GELU_TANH":
        x = activated(x, "gelu_tanh")
    elif OPCODE == "SIGMOID":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif OPCODE == "TANH":
        x = tanh(x, WIDE)
    elif OPCODE == "EXP":
        x = exponential(x, WIDE)
    elif OPCODE == "LOG":
        x = tl.log(x)
    elif OPCODE == "SIN":
        x = tl.sin(x)
    elif OPCODE == "COS":
        x = tl.cos(x)
    elif OPCODE == "SQRT":
        x = tl.sqrt_rn(x) if tl.float32 == WIDE else tl.sqrt(x)
    elif OPCODE == "SQUARE":
        x = x * x
    elif OPCODE == "RELU":
        x = tl.where(x < 0, 0.0, x)  # a NaN is not below 0, and stays
    elif OPCODE == "ABS":
        x = tl.abs(x)
    else:
        tl.static_assert(OPCODE == "COPY", "an unknown instruction")
    return x


@kernel
def pointwise_kernel(
    out, inputs, sizes, out_strides, strides, inner_size, outer_size, inner_tiles, out_inner, inners,
    CODE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, NUMBERS: tl.constexpr, DIMS: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, COPIES: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of the innermost dimension and of all others as one; ``strides`` holds DIMS numbers of each input.

    Bit i of ALONG and ACROSS says whether input i varies along the innermost dimension, and across the others: what
    does not is loaded once for all.
    """
    wait_for_previous()
    pid = tl.program_id(0)
    along = (pid % inner_tiles).to(tl.int64) * INNER + tl.arange(0, INNER)[None, :]
    tile = pid // inner_tiles
    if LONG:  # else quotients are of 32 bits, several times as fast
        tile = tile.to(tl.int64)
    across = tile * OUTER + tl.arange(0, OUTER)[:, None]
    in_along, in_across = along < inner_size, across < outer_size
    to = out + along * out_inner
    rest = across
    for d in tl.static_range(DIMS):
        to += (rest % sizes[d]).to(tl.int64) * out_strides[d]
        rest = rest // sizes[d]
    registers = ()
    for i in tl.static_range(len(inputs)):
        at = inputs[i] + tl.zeros([1, 1], tl.int64)
        mask = tl.full([1, 1], True, tl.int1)
        if (ALONG >> i) % 2 == 1:
            at += along * inners[i]
            mask = mask & in_along
        if (ACROSS >> i) % 2 == 1:
            rest = across
            for d in tl.static_range(DIMS):
                at += (rest % sizes[d]).to(tl.int64) * strides[i * DIMS + d]
                rest = rest // sizes[d]
            mask = mask & in_across
        value = tl.load(at, mask, other=0)
        if not COPIES:
            value = value.to(WIDE)
        registers = registers + (value,)  # noqa: RUF005 - not Python
    for i in tl.static_range(len(CODE)):
        value = computed(registers[A[i]], registers[B[i]], i, CODE, NUMBERS, WIDE)
        registers = registers + (value,)  # noqa: RUF005 - not Python
    result = tl.broadcast_to(registers[len(inputs) + len(CODE) - 1], [OUTER, INNER])
    tl.store(to, result.to(out.dtype.element_ty), in_across & in_along)


def pointwise(
    inputs: Sequence[Tensor],
    opcodes: Sequence[int],
    a: Sequence[int],
    b: Sequence[int],
    numbers: Sequence[float],
    into: Tensor | None = None,
) -> Tensor:
    """Run the chain; the arguments are those of ``fastens::pointwise``, ``into`` is where the result is written.

    It may be of any dtype and strides, which no two of its elements share.
    """
    out = into
    if out is None:
        size = torch.broadcast_shapes(*(x.shape for x in inputs))
        out = torch.empty(size, dtype=result_dtype(inputs), device=inputs[0].device)
    if out.numel() == 0:
        return out
    dims = merged_dims(tuple(out.shape), (out.stride(), *(x.expand(out.shape).stride() for x in inputs)))
    *outer, (inner_size, (out_inner, *inners)) = dims
    # what is contiguous in an input, but not along the innermost dimension, comes next, in tiles as high as wide
    turned = [
        i for i, (_, of) in enumerate(outer) if any(s == 1 < inner for s, inner in zip(of[1:], inners, strict=True))
    ]
    if turned:
        outer.append(outer.pop(turned[-1]))
    sizes = tuple(size for size, _ in reversed(outer))  # the fastest first, as the kernel divides them out
    out_strides, *strides = [tuple(of[i] for _, of in reversed(outer)) for i in range(len(inputs) + 1)]
    outer_size = math.prod(sizes)
    inner_block = min(SQUARE if turned else TILE, next_power_of_2(inner_size))
    outer_block = min(TILE // inner_block, next_power_of_2(outer_size))
    inner_tiles = cdiv(inner_size, inner_block)
    names = tuple(Opcode(opcode).name for opcode in opcodes)
    with device_of(out).current():
        pointwise_kernel[(inner_tiles * cdiv(outer_size, outer_block),)](
            out, tuple(inputs), sizes, out_strides, sum(strides, ()), inner_size, outer_size, inner_tiles, out_inner,
            tuple(inners), CODE=names, A=tuple(a), B=tuple(b), NUMBERS=tuple(numbers), DIMS=len(sizes),
            ALONG=sum(1 << i for i, stride in enumerate(inners) if stride),
            ACROSS=sum(1 << i for i, of_input in enumerate(strides) if any(of_input)),
            COPIES=set(names) == {"COPY"}, LONG=outer_size + outer_block > SHORT, OUTER=outer_block, INNER=inner_block,
            WIDE=tl.float64 if any(x.dtype == torch.float64 for x in inputs) else tl.float32,
            num_warps=max(1, outer_block * inner_block // 256),
            enable_fp_fusion=False,  # a product and a sum round one after the other, as in the network
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=4096)
def merged_dims(
    sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return size and strides of the dimensions that remain where neighbours are as one in every operand.

    The slowest of the first operand comes first; there is one dimension at least.

    Args:
        sizes: of the dimensions.
        strides: of each operand.
    """
    dims = [(size, of) for size, *of in zip(sizes, *strides, strict=True) if size > 1]
    found: list[tuple[int, tuple[int, ...]]] = []
    for size, of in sorted(dims, key=lambda dim: -dim[1][0]):
        if found and all(outer == inner * size for outer, inner in zip(found[-1][1], of, strict=True)):
            found[-1] = (found[-1][0] * size, tuple(of))
        else:
            found.append((size, tuple(of)))
    return tuple(found) or ((1, (0,) * len(strides)),)
