"""Folded linear layers, and ``F.linear``, ``x @ W`` and other products with a member's own weight."""

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


@folds(torch.einsum)
def folded_einsum(equation: Any, *operands: Any) -> Any:
    """A product over the last dimension of the batch and the first of a member's matrix, ``"abcd,de->abce"``."""
    if not isinstance(equation, str) or len(operands) != 2 or not isinstance(operands[1], MemberTensor):
        return NotImplemented
    terms, _, out = equation.replace(" ", "").partition("->")
    x, _, weight = terms.partition(",")
    own = len(weight) == 2 and len(set(x + weight)) == len(x) + 1
    if not own or not x.isalpha() or weight[0] != x[-1] or out != x[:-1] + weight[1]:
        return NotImplemented
    return folded_matmul(*operands)


@folds(torch.outer, torch.ger, torch.Tensor.outer, torch.Tensor.ger)
def folded_outer(input: Any, vec2: Any) -> Any:
    """Every row's number times a vector of its member, as Fourier features of the noise level are made."""
    if not isinstance(vec2, MemberTensor) or not isinstance(input, Tensor) or not vec2.rows.carries_batch(input):
        return NotImplemented
    return input[:, None] * vec2
