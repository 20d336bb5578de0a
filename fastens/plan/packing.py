"""Weights of convolutions in the order in which the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastens.ops.run_program import target
from fastens.program import steps


def multiplies_bfloat16() -> bool:
    """Whether programs run on an instruction set with products of bfloat16."""
    return target() == "avx512_bf16"


def pack(weight: Tensor, vectors: int, pairs: bool = False) -> Tensor:
    """Order a stack [K, C_out, C_in, kernel_h, kernel_w] as the kernels read it.

    Args:
        weight: the stack.
        vectors: of output channels in one block.
        pairs: keep bfloat16 values, two input channels in the place of one float32.

    Returns:
        [K, block, tap, C_in, 16 * vectors], flat for each member; the last block may be narrower, and the channels are
        filled up with zeros to whole vectors. With pairs, [K, block, tap, C_in / 2, 16 * vectors, 2], seen as float32.
    """
    members, out_channels = weight.shape[:2]
    missing = -out_channels % steps.LANES
    full = torch.nn.functional.pad(weight.detach().float(), (0, 0) * 3 + (0, missing)) if missing else weight
    blocks = full.split(vectors * steps.LANES, dim=1)
    if pairs:
        taps = [b.permute(0, 3, 4, 2, 1).unflatten(3, (-1, 2)).transpose(4, 5).reshape(members, -1) for b in blocks]
        return torch.cat(taps, 1).to(torch.bfloat16).contiguous().view(torch.float32)
    return torch.cat([b.permute(0, 3, 4, 2, 1).reshape(members, -1) for b in blocks], 1)
