"""Dropout with a mask for each member, in PyTorch integer arithmetic."""

import torch
from torch import Tensor

from fastens.reference._activation import activate
from fastens.reference._philox import philox

_MASK = 0xFFFFFFFF


def dropout(
    x: Tensor,
    members: Tensor,
    samples: Tensor | None,
    p: float,
    key: int,
    evaluation: int,
    activation: str = "none",
) -> Tensor:
    """Zero elements of the activated ``x`` [R, ...] with probability p and divide the others by 1 - p.

    Element e of a row of member k and sample s is kept where word e % 4 of Philox4x32-10 at counter (e // 4, k, s + 1,
    evaluation) under ``key`` is at least p * 2^32. Without samples the third and fourth counters are 0. Elements are
    counted as in a contiguous row, whatever the layout of ``x``.
    """
    rows = x.shape[0]
    count = x.shape[1:].numel()
    blocks = torch.arange((count + 3) // 4, device=x.device)
    member = members.to(x.device)[:, None] & _MASK
    if samples is None:
        sample, evaluation = torch.zeros_like(member), 0
    else:
        sample = (samples.to(x.device)[:, None] + 1) & _MASK
    counter = torch.broadcast_tensors(blocks & _MASK, member, sample, torch.full_like(member, evaluation & _MASK))
    words = torch.stack(philox(counter, key), -1).reshape(rows, 4 * len(blocks))[:, :count]
    kept = (words >= round(p * 2**32)).reshape(x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = kept.to(wide) * (1 / (1 - p) if p < 1 else 0.0)
    return (activate(x, activation) * scale).to(x.dtype)


def masked(y: Tensor, members: Tensor | None, samples: Tensor | None, p: float, key: int, evaluation: int) -> Tensor:
    """The dropout behind another op: ``y`` itself where p is 0."""
    return y if members is None or p == 0 else dropout(y, members, samples, p, key, evaluation)
