"""Weights of convolutions in the order in which the kernels read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastens.ops.run_program import target
from fastens.plan.memory import At, Constant, Constants
from fastens.program import steps
from fastens.program.winograd import transformed


def multiplies_bfloat16() -> bool:
    """Whether programs run on an instruction set with products of bfloat16."""
    return target() == "avx512_bf16"


def packed_size(shape: tuple[int, ...], pairs: bool = False, squares: int = 0) -> int:
    """How many float32 a packed stack [K, C_out, C_in, kernel_h, kernel_w] takes."""
    members, out_channels, in_channels, *kernel = shape
    taps = (squares + 2) ** 2 if squares else math.prod(kernel)
    return members * -(-out_channels // steps.LANES) * steps.LANES * in_channels * taps // (2 if pairs else 1)


def packed(constants: Constants, weight: Constant, vectors: int, pairs: bool, squares: int) -> At:
    """Where packed weights are, packed now if that was not done yet; arguments as of :func:`pack`."""
    stack = weight.tensor
    size = packed_size(stack.shape, pairs, squares)
    key = ("packed", weight.key, vectors, pairs, squares)
    return constants.write(key, size, lambda into: pack(stack, vectors, pairs, into, squares), stack)


def pack(weight: Tensor, vectors: int, pairs: bool, into: Tensor, squares: int = 0) -> None:
    """Order a stack [K, C_out, C_in, kernel_h, kernel_w] as the kernels read it.

    Args:
        weight: the stack.
        vectors: of output channels in one block.
        pairs: keep bfloat16 values, two input channels in the place of one float32.
        into: float32 [packed_size], filled with [K, block, tap, C_in, 16 * vectors], flat for each member; the last
            block may be narrower, and the channels are filled up with zeros to whole vectors. With pairs it holds
            [K, block, tap, C_in / 2, 16 * vectors, 2] in bfloat16.
        squares: pixels on a side of Winograd's squares, for which the kernels are transformed; 0 for none.
    """
    if squares:
        for kernels, place in zip(weight.detach().split(1), into.chunk(len(weight)), strict=True):
            pack(transformed(kernels, squares), vectors, pairs, place)  # one by one: it takes memory
        return
    members, out_channels, in_channels, *kernel = weight.shape
    missing = -out_channels % steps.LANES
    full = torch.nn.functional.pad(weight.detach(), (0, 0) * 3 + (0, missing)) if missing else weight.detach()
    flat = (into.view(torch.bfloat16) if pairs else into).view(members, -1)
    start = 0
    for block in full.split(vectors * steps.LANES, dim=1):
        width = block.shape[1]
        stop = start + width * in_channels * math.prod(kernel)
        place, start = flat[:, start:stop], stop
        if pairs:
            place = place.unflatten(1, (*kernel, in_channels // 2, width, 2))
            place.copy_(block.permute(0, 3, 4, 2, 1).unflatten(3, (-1, 2)).transpose(4, 5))
        else:
            place.unflatten(1, (*kernel, in_channels, width)).copy_(block.permute(0, 3, 4, 2, 1))
