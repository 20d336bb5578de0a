"""Normalisations: member-batched where scale and shift differ, of all rows where they are common."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import AS_STEPS, Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import plain
from fastens.fold.tensor import member_valued
from fastens.fold.writes import check_written, promote
from fastens.ops.batch_norm import batch_norm
from fastens.ops.group_norm import group_norm
from fastens.ops.layer_norm import layer_norm
from fastens.ops.rms_norm import rms_norm


def _parameters(fold: Fold, input: Any, *values: Any) -> tuple[list[Any], Tensor | None]:
    """Parameters as the ops take them, [1, ...] where all are common, and the offsets beside them."""
    if not any(map(member_valued, values)):
        return [None if value is None else plain(value)[None] for value in values], None
    stacks, dealt = fold.parameters(*values)
    return stacks, fold.hidden.scaled_offsets(input.shape[0]) if dealt else None


@rule(F.group_norm, torch.group_norm, own_op=True)
def group(fold: Fold, func: Any, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
          *_: Any) -> Any:  # fmt: skip
    """Statistics over groups of channels of each row."""
    if not any(map(member_valued, (weight, bias))) and not fold.recording:
        return fold.unrows(F.group_norm(fold.rows(input), num_groups, plain(weight), plain(bias), eps))
    (scale, shift), offsets = _parameters(fold, input, weight, bias)
    if not any(map(member_valued, (input, weight, bias))):
        return fold.common(group_norm(plain(input), num_groups, scale, shift, eps))
    return fold.unrows(group_norm(fold.rows(input), num_groups, scale, shift, eps, offsets))


AS_STEPS.update(dict.fromkeys((F.group_norm, torch.group_norm), group))


@rule(F.layer_norm, torch.layer_norm, own_op=True)
def layer(fold: Fold, func: Any, input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
          eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Statistics over the last dimensions."""
    if input.ndim <= len(normalized_shape):
        if any(map(member_valued, (weight, bias))):
            y = (
                fold.again(func, input, normalized_shape, None, None, eps)
                if member_valued(input)
                else (func(plain(input), normalized_shape, None, None, eps))
            )
            y = y if weight is None else fold.again(torch.mul, y, weight)
            return y if bias is None else fold.again(torch.add, y, bias)
        return fold.wrap(func(fold.stack(input), normalized_shape, plain(weight), plain(bias), eps))
    if not any(map(member_valued, (weight, bias))) and not fold.recording:
        return fold.wrap(func(fold.stack(input), normalized_shape, plain(weight), plain(bias), eps))
    tokens = fold.dealt_tokens(input) if len(normalized_shape) == 1 else None
    if tokens is not None:
        y = fold.stack(fold.again(func, tokens, normalized_shape, weight, bias, eps))
        return fold.wrap(y.reshape(len(y), *input.shape))
    (scale, shift), offsets = _parameters(fold, input, weight, bias)
    return fold.unrows(layer_norm(fold.rows(input), normalized_shape, scale, shift, eps, offsets))


@rule(F.rms_norm, torch.rms_norm, own_op=True)
def rms(fold: Fold, func: Any, input: Any, normalized_shape: Sequence[int], weight: Any = None,
        eps: float | None = None) -> Any:  # fmt: skip
    """The root mean square over the last dimensions."""
    if not member_valued(weight):
        return fold.wrap(func(fold.stack(input), normalized_shape, plain(weight), eps))
    if input.ndim <= len(normalized_shape):
        return NotImplemented
    (scale,), offsets = _parameters(fold, input, weight)
    return fold.unrows(rms_norm(fold.rows(input), normalized_shape, scale, eps, offsets))


@rule(F.batch_norm, own_op=True)
def batch(fold: Fold, func: Any, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
          training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Running statistics of each member; those of a batch are taken entry by entry."""
    if training or running_mean is None or running_var is None:
        _own_statistics(fold, running_mean, running_var)
        return NotImplemented
    if input.ndim < 2:
        return NotImplemented
    (mean, var, scale, shift), offsets = _parameters(fold, input, running_mean, running_var, weight, bias)
    return fold.unrows(batch_norm(fold.rows(input), mean, var, scale, shift, eps, offsets))


@rule(torch.batch_norm, own_op=True)
def batch_of_torch(fold: Fold, func: Any, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
                   *options: Any, **kwargs: Any) -> Any:  # fmt: skip
    """The same by torch's own function, which takes the parameters first."""
    return batch(fold, func, input, running_mean, running_var, weight, bias, *options, **kwargs)


@rule(
    *named("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    torch.ops.aten._batch_norm_with_update,
)
def native_batch(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Entry by entry, and each entry's own statistics are updated."""
    _own_statistics(fold, *args[3:5], kwargs.get("running_mean"), kwargs.get("running_var"))
    return NotImplemented


def _own_statistics(fold: Fold, *statistics: Any) -> None:
    """Statistics that a batch updates become each member's own."""
    check_written(fold, statistics)
    for x in statistics:
        if isinstance(x, Tensor) and not member_valued(x):
            promote(fold, x)


@rule(F.instance_norm, own_op=True)
def instance(fold: Fold, func: Any, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
             bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
             ) -> Any:  # fmt: skip
    """Statistics over each channel of each row: a group norm with one channel a group."""
    if not use_input_stats and input.ndim > 2:
        return batch(fold, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if not use_input_stats or running_mean is not None or running_var is not None or input.ndim < 3:
        if use_input_stats:
            _own_statistics(fold, running_mean, running_var)
        return NotImplemented
    if math.prod(input.shape[2:]) < 2:
        return NotImplemented  # torch's own error
    return group(fold, F.group_norm, input, input.shape[1], weight, bias, eps)


@rule(torch.instance_norm, own_op=True)
def instance_of_torch(fold: Fold, func: Any, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
                      *options: Any, **kwargs: Any) -> Any:  # fmt: skip
    """The same by torch's own function, which takes the parameters first."""
    options = options[:3]  # without that of a library
    return instance(fold, func, input, running_mean, running_var, weight, bias, *options, **kwargs)
