"""Folded normalisations, and their functions with a member's own scale and shift."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.fold.looped import run_looped
from fastens.fold.member_tensor import MemberTensor, folds
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.fold.stacks import call_op, stack_of
from fastens.ops.batch_norm import batch_norm
from fastens.ops.group_norm import group_norm
from fastens.ops.layer_norm import layer_norm
from fastens.ops.rms_norm import rms_norm


class FoldedGroupNorm(FoldedLayer):
    """Group normalisations of all members."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, C, *space]."""
        return group_norm(x, self.num_groups, self.stack("weight"), self.stack("bias"), self.eps, offsets)


class FoldedLayerNorm(FoldedLayer):
    """Layer normalisations of all members."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, ..., *normalized_shape]."""
        return layer_norm(x, self.normalized_shape, self.stack("weight"), self.stack("bias"), self.eps, offsets)


class FoldedRMSNorm(FoldedLayer):
    """Root-mean-square normalisations of all members."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, ..., *normalized_shape]."""
        return rms_norm(x, self.normalized_shape, self.stack("weight"), self.eps, offsets)


class FoldedBatchNorm(FoldedLayer):
    """Batch normalisations of all members in evaluation mode; in training mode each member's is run alone."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run looped while batch statistics are wanted: they are taken over each member's own rows."""
        if self.training or self.stack("running_mean") is None:
            return run_looped(self, (x, *args), kwargs)
        return super().forward(x, *args, **kwargs)

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, C, ...]."""
        mean, var = self.stack("running_mean"), self.stack("running_var")
        return batch_norm(x, mean, var, self.stack("weight"), self.stack("bias"), self.eps, offsets)


register_layer(nn.GroupNorm, FoldedGroupNorm)
register_layer(nn.LayerNorm, FoldedLayerNorm)
register_layer(nn.RMSNorm, FoldedRMSNorm)
for _layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register_layer(_layer, FoldedBatchNorm)


def _like(*values: Any) -> MemberTensor | None:
    return next((value for value in values if isinstance(value, MemberTensor)), None)


@folds(F.group_norm, torch.group_norm)
def folded_group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """``F.group_norm`` where scale and shift are parameters of each member."""
    like = _like(weight, bias)
    if like is None:
        return NotImplemented
    scale, shift = stack_of(weight, like), stack_of(bias, like)
    return call_op(lambda x, offsets: group_norm(x, num_groups, scale, shift, eps, offsets), input, like.rows)


@folds(F.layer_norm, torch.layer_norm)
def folded_layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """``F.layer_norm`` where scale and shift are parameters of each member."""
    like = _like(weight, bias)
    if like is None:
        return NotImplemented
    scale, shift = stack_of(weight, like), stack_of(bias, like)
    return call_op(lambda x, offsets: layer_norm(x, normalized_shape, scale, shift, eps, offsets), input, like.rows)


@folds(F.rms_norm, torch.rms_norm)
def folded_rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """``F.rms_norm`` where the scale is a parameter of each member."""
    if not isinstance(weight, MemberTensor):
        return NotImplemented
    return call_op(lambda x, offsets: rms_norm(x, normalized_shape, weight.stack, eps, offsets), input, weight.rows)
