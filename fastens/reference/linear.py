"""Member-batched linear layer, naively."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.reference._activation import activate
from fastens.reference._rows import per_member, rows_of
from fastens.reference.dropout import masked


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
) -> Tensor:
    """Row r of member k: ``act(x[r] @ weight[k].T + bias[k])``. Shapes as in :func:`fastens.ops.linear.linear`."""
    y = activate(_linear(x, weight, bias, offsets), activation)
    return masked(y, members, samples, p, key, evaluation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return per_member(
            lambda rows, k: F.linear(rows, weight[k], None if bias is None else bias[k]), x, weight.shape[0], offsets
        )
    grouped = x.reshape(weight.shape[0], -1, x.shape[-1])  # [K, B*..., in]
    if bias is None:
        y = torch.bmm(grouped, weight.transpose(1, 2))
    else:
        y = torch.baddbmm(bias.unsqueeze(1), grouped, weight.transpose(1, 2))
    return rows_of(y if x.ndim == 2 else y.unflatten(1, (x.shape[0] // weight.shape[0], *x.shape[1:-1])))
