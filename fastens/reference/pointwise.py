"""A chain of elementwise instructions, naively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.program.steps import Opcode

UNARY: dict[Opcode, Callable[[Tensor], Tensor]] = {
    Opcode.SILU: F.silu,
    Opcode.GELU: lambda x: F.gelu(x.double()).to(x.dtype),  # in float32, torch has NaN for inf
    Opcode.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Opcode.SIGMOID: torch.sigmoid,
    Opcode.TANH: torch.tanh,
    Opcode.EXP: torch.exp,
    Opcode.LOG: torch.log,
    Opcode.SIN: torch.sin,
    Opcode.COS: torch.cos,
    Opcode.SQRT: torch.sqrt,
    Opcode.SQUARE: torch.square,
    Opcode.RELU: torch.relu,
    Opcode.ABS: torch.abs,
}
BINARY: dict[Opcode, Callable[[Any, Any], Tensor]] = {
    Opcode.ADD: torch.add,
    Opcode.SUBTRACT: torch.sub,
    Opcode.MULTIPLY: torch.mul,
    Opcode.DIVIDE: torch.div,
}
NUMBERED: dict[Opcode, Callable[[Tensor, float], Tensor]] = {
    Opcode.ADD_NUMBER: torch.add,
    Opcode.MULTIPLY_NUMBER: torch.mul,
    Opcode.DIVIDE_NUMBER: torch.div,
    Opcode.NUMBER_MINUS: lambda x, number: number - x,
    Opcode.NUMBER_OVER: lambda x, number: torch.full_like(x, number) / x,  # torch has a reciprocal and a product
}


def instructed(opcode: Opcode, a: Tensor, b: Tensor, number: float) -> Tensor:
    """What an instruction computes of its operands: the definition that every kernel is held against."""
    if opcode is Opcode.COPY:
        return a
    if opcode in UNARY:
        return UNARY[opcode](a)
    return BINARY[opcode](a, b) if opcode in BINARY else NUMBERED[opcode](a, number)


def unrounded(
    inputs: Sequence[Tensor], opcodes: Sequence[int], a: Sequence[int], b: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    """The last register of the chain, in float32 or float64; of copies alone, in the dtype of what is copied."""
    registers = list(inputs)
    if any(opcode != Opcode.COPY for opcode in opcodes):
        registers = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in registers]
    for code, first, second, number in zip(opcodes, a, b, numbers, strict=True):
        registers.append(instructed(Opcode(code), registers[first], registers[second], number))
    return registers[-1]


def pointwise(inputs: list[Tensor], opcodes: list[int], a: list[int], b: list[int], numbers: list[float]) -> Tensor:
    """Run the chain, and round once. Shapes as in :func:`fastens.ops.pointwise.pointwise`."""
    dtype = result_dtype(inputs)
    size = torch.broadcast_shapes(*(x.shape for x in inputs))
    # a copy, since an op returns none of its inputs
    return unrounded(inputs, opcodes, a, b, numbers).to(dtype).expand(size).clone(memory_format=torch.contiguous_format)


def result_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    """The dtype that the inputs promote to."""
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
