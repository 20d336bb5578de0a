"""Products: member-batched where the weights differ, one product of all rows where they are common."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import plain
from fastens.fold.tensor import member_valued
from fastens.ops.linear import linear


@rule(*named("linear"), own_op=True)
def linear_rule(fold: Fold, func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``."""
    if not member_valued(weight):
        if not member_valued(input):  # only the bias differs
            return fold.again(torch.add, func(plain(input), plain(weight)), bias)
        if bias is not None and member_valued(bias):
            return fold.again(torch.add, fold.again(func, input, weight), bias)
        if input.ndim < 2 or weight.ndim != 2:
            return fold.wrap(func(fold.stack(input), plain(weight), plain(bias)))
        if fold.recording:  # the step of plans, with one member
            stack = None if bias is None else plain(bias)[None]
            return fold.unrows(linear(fold.rows(input), plain(weight)[None], stack))
        return fold.unrows(func(fold.rows(input), plain(weight), plain(bias)))
    if weight.ndim != 2 or not input.numel() or not weight.numel():
        return NotImplemented
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"linear: input of {input.shape[-1]} features, weight expects {weight.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:  # one number for all features
        return fold.again(torch.add, fold.again(func, input, weight), bias)
    tokens = fold.dealt_tokens(input)
    if tokens is not None:
        y = fold.stack(fold.again(F.linear, tokens, weight, bias))
        return fold.wrap(y.reshape(len(y), *input.shape[:-1], y.shape[-1]))
    (weights, biases), dealt = fold.parameters(weight, bias)
    single = input.ndim == 1
    rows = fold.rows(input.unsqueeze(0) if single and not member_valued(input) else input) if not single else None
    if rows is None:
        rows = fold.entries(input)
    per_entry = 1 if single else input.shape[0]
    offsets = fold.hidden.scaled_offsets(per_entry) if dealt else None
    y = linear(rows, weights, biases, offsets)
    return fold.wrap(y) if single else fold.unrows(y)


def _as_weight(fold: Fold, x: Any, other: Any) -> bool:
    """Whether ``other`` is a matrix that rows of ``x`` are multiplied by."""
    return member_valued(other) and other.ndim == 2 and x.ndim >= 2 and not fold.hidden.whole


@rule(*named("matmul linalg.matmul __matmul__ mm bmm"), own_op=True)
def matmul(fold: Fold, func: Any, input: Any, other: Any) -> Any:
    """Products of matrices and vectors."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if member_valued(other) and other.ndim == 2 and input.ndim >= 1:
        product = linear_rule(fold, F.linear, input, fold.again(Tensor.transpose, other, 0, 1))
        if product is not NotImplemented:
            return product
    if not member_valued(other) and other.ndim == 2 and input.ndim >= 2:  # one product for all
        return fold.unrows(torch.matmul(fold.rows(input), plain(other)))
    if input.ndim == 0 or other.ndim == 0:
        raise RuntimeError("both arguments to matmul need to be at least 1D")
    if fold.recording and input.ndim == other.ndim and input.ndim > 2 and input.shape[0] == other.shape[0]:
        return fold.unrows(torch.matmul(fold.rows(input), fold.rows(other)))
    left, right = fold.entries(input), fold.entries(other)
    vector_left, vector_right = input.ndim == 1, other.ndim == 1
    left = left.unsqueeze(1) if vector_left else left
    right = right.unsqueeze(2) if vector_right else right
    missing = left.ndim - right.ndim
    left = left[(slice(None), *(None,) * max(0, -missing))]
    right = right[(slice(None), *(None,) * max(0, missing))]
    out = torch.matmul(left, right)
    out = out.squeeze(-1) if vector_right else out
    return fold.wrap(out.squeeze(-1 if vector_right else -2) if vector_left else out)


@rule(*named("__rmatmul__"))
def rmatmul(fold: Fold, func: Any, input: Any, other: Any) -> Any:
    """``other @ input``."""
    return fold.again(torch.matmul, other, input)


@rule(*named("mv dot inner vdot"), own_op=True)
def vectors(fold: Fold, func: Any, input: Any, other: Any) -> Any:
    """Products with vectors."""
    if other.ndim != 1 or not 1 <= input.ndim <= 2 or func.__name__ == "vdot":
        return NotImplemented
    return matmul(fold, torch.matmul, input, other)


@rule(*named("outer ger"))
def outer(fold: Fold, func: Any, input: Any, vec2: Any) -> Any:
    """Every number times a vector, as Fourier features of the noise level are made."""
    return fold.again(torch.mul, fold.again(Tensor.unsqueeze, input, 1), vec2)


@rule(*named("addmm baddbmm addbmm addmv"), own_op=True)
def add_product(
    fold: Fold, func: Any, input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1, **kwargs: Any
) -> Any:
    """``beta * input + alpha * a @ b``."""
    if kwargs or func.__name__ == "addbmm":
        return NotImplemented
    if fold.recording and func.__name__ == "baddbmm":
        return fold.unrows(
            torch.baddbmm(fold.rows(_batched(fold, input, a)), fold.rows(a), fold.rows(b), beta=beta, alpha=alpha)
        )
    product = fold.again(torch.matmul, a, b)
    product = product if alpha == 1 else fold.again(torch.mul, product, alpha)
    if beta == 0:
        return product
    return fold.again(torch.add, product, input if beta == 1 else fold.again(torch.mul, input, beta))


def _batched(fold: Fold, input: Any, a: Any) -> Any:
    return (
        input
        if input.ndim == 3 and input.shape[0] == a.shape[0]
        else fold.again(Tensor.expand, input, a.shape[0], input.shape[-2], input.shape[-1])
    )


@rule(torch.einsum, torch.functional.einsum, own_op=True)
def einsum(fold: Fold, func: Any, equation: Any, *operands: Any) -> Any:
    """The equation with a letter for the hidden dimension in front of member-valued operands."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not all(isinstance(x, Tensor) for x in operands):
        return NotImplemented
    terms, arrow, out = equation.replace(" ", "").partition("->")
    letter = next(c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba" if c not in equation)
    parts = terms.split(",")
    if len(parts) != len(operands):
        raise RuntimeError(f"einsum(): {len(operands)} operands for {len(parts)} terms")
    if not arrow:
        once = sorted(c for c in set(terms) - set(",.") if terms.count(c) == 1)
        out = "..." * ("..." in terms) + "".join(once)
    product = _product_with_matrix(fold, parts, out, operands)
    if product is not None:
        return product
    stacks = [fold.stack(x) if member_valued(x) else plain(x) for x in operands]
    parts = [letter + part if member_valued(x) else part for part, x in zip(parts, operands, strict=True)]
    return fold.wrap(torch.einsum(f"{','.join(parts)}->{letter}{out}", *stacks))


def _product_with_matrix(fold: Fold, parts: list[str], out: str, operands: Any) -> Any:
    """``"abcd,de->abce"`` with a member's matrix: the product that plans know."""
    if len(parts) != 2 or not member_valued(operands[1]) or any("." in part for part in parts):
        return None
    x, weight = parts
    own = len(weight) == 2 and len(set(x + weight)) == len(x) + 1
    if not own or operands[0].shape[-1] != operands[1].shape[0]:  # einsum sees a dimension of one as often as it has to
        return None
    if weight[0] != x[-1] or out != x[:-1] + weight[1] or len(x) < 2:
        return None
    return matmul(fold, torch.matmul, *operands)
