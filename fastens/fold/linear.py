"""Folded linear layers, and ``F.linear`` and ``x @ W`` with a member's own weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.fold.member_tensor import MemberTensor, folds
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.fold.stacks import call_op, stack_of
from fastens.ops.linear import linear


class FoldedLinear(FoldedLayer):
    """Linear layers of all members: one batched matrix product."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, ..., in] -> [R, ..., out]."""
        return linear(x, self.stack("weight"), self.stack("bias"), offsets)


register_layer(nn.Linear, FoldedLinear)


@folds(F.linear)
def folded_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` where the weight is a parameter of each member."""
    if not isinstance(weight, MemberTensor) or weight.ndim != 2:
        return NotImplemented
    return call_op(lambda x, offsets: linear(x, weight.stack, stack_of(bias, weight), offsets), input, weight.rows)


@folds(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def folded_matmul(input: Any, other: Any) -> Any:
    """``x @ W`` where W is a matrix of each member."""
    if not isinstance(other, MemberTensor) or other.ndim != 2:
        return NotImplemented
    return call_op(lambda x, offsets: linear(x, other.stack.transpose(1, 2), None, offsets), input, other.rows)
