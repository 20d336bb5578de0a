"""Convolutions: member-batched where the kernels differ, one of all rows where they are common."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.device import on_gpu
from fastens.fold.dispatch import Fold, rule
from fastens.fold.nested import plain
from fastens.fold.tensor import member_valued
from fastens.ops.conv import CHOICE, conv


def _numbers(value: int | Sequence[int], space: int) -> tuple[int, ...]:
    return (value,) * space if isinstance(value, int) else tuple(value) * (space if len(value) == 1 else 1)


_Numbers = Sequence[int]
# Those of fastens.ops.conv.conv: stride, padding, dilation, transposed, output_padding, groups.
_Arguments = tuple[_Numbers, _Numbers, _Numbers, bool, _Numbers, int]


def _convolve(fold: Fold, func: Any, space: int, input: Any, weight: Any, bias: Any, arguments: _Arguments) -> Any:
    if input.ndim == space + 1:  # without batch
        out = _convolve(fold, func, space, fold.again(Tensor.unsqueeze, input, 0), weight, bias, arguments)
        return fold.again(Tensor.squeeze, out, 0)
    if input.ndim != space + 2 or weight.ndim != space + 2 or weight.is_complex():  # of which kernels know none
        return NotImplemented
    rows = fold.rows(input)
    if arguments[3] and not member_valued(weight) and not member_valued(bias):
        stride, padding, dilation, _, output_padding, groups = arguments
        return fold.unrows(func(rows, plain(weight), plain(bias), stride, padding, output_padding, groups, dilation))
    if not member_valued(weight) and not member_valued(bias):
        weights, biases, offsets = plain(weight)[None], None if bias is None else plain(bias)[None], None
    else:
        (weights, biases), dealt = fold.parameters(weight, bias)
        offsets = fold.hidden.scaled_offsets(input.shape[0]) if dealt else None
    whole = (rows, weights, biases, *arguments, offsets)
    way = CHOICE.choose(whole, rows.device, ruled=not fold.reference)
    fold.ways[id(weight.stack if member_valued(weight) else plain(weight))] = way
    y = conv(*whole, way=way)
    if not fold.recording and rows.is_contiguous() and not on_gpu(rows):
        y = y.contiguous()
    return fold.unrows(y)


def _plain(space: int) -> Any:
    def convolution(
        fold: Fold, func: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        strides, dilations = _numbers(stride, space), _numbers(dilation, space)
        if isinstance(padding, str):
            if padding == "valid":
                padding = 0
            else:
                total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
                if any(t % 2 for t in total):
                    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
                    input, padding = fold.again(F.pad, input, sides), 0
                else:
                    padding = [t // 2 for t in total]
        rest = (strides, _numbers(padding, space), dilations, False, (0,) * space, groups)
        return _convolve(fold, func, space, input, weight, bias, rest)

    return convolution


def _transposed(space: int) -> Any:
    def convolution(
        fold: Fold, func: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        strides, paddings, dilations, more = (_numbers(n, space) for n in (stride, padding, dilation, output_padding))
        return _convolve(fold, func, space, input, weight, bias, (strides, paddings, dilations, True, more, groups))

    return convolution


for _space in (1, 2, 3):
    rule(*{getattr(F, f"conv{_space}d"), getattr(torch, f"conv{_space}d")}, own_op=True)(_plain(_space))
    rule(*{getattr(F, f"conv_transpose{_space}d"), getattr(torch, f"conv_transpose{_space}d")}, own_op=True)(
        _transposed(_space)
    )
