"""Folded convolutions, and ``F.conv*`` with a member's own kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.fold.member_tensor import MemberTensor, folds
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.fold.rows import NotFoldable, Rows
from fastens.fold.stacks import call_op, stack_of
from fastens.ops.conv import CHOICE, conv


def _way(arguments: tuple[Any, ...], rows: Rows) -> str:
    """The way to take; an ensemble that wants no kernels for the CPU gets none by a rule."""
    return CHOICE.choose(arguments, arguments[0].device, ruled=not rows.reference)


class _Convolves(FoldedLayer):
    """A layer whose report says which way of convolution it took last."""

    run_by = "not run yet"

    def _conv(self, *arguments: Any) -> Tensor:
        """``conv`` of all its arguments."""
        way = _way(arguments, self.rows)
        if not torch.compiler.is_compiling():
            self.__dict__["run_by"] = way
        return conv(*arguments, way=way)


class FoldedConv(_Convolves):
    """Convolutions of all members, in one to three dimensions."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /) -> Tensor:
        """Evaluate ``x`` [R, C_in, *space] -> [R, C_out, *space']."""
        weight = self.stack("weight")
        space = weight.ndim - 3
        if x.ndim != space + 2:
            raise NotFoldable(f"input of {x.ndim} dimensions to a {space}-d convolution")
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * space
        else:
            padding = self.padding
        bias, unpadded = self.stack("bias"), (0,) * space
        return self._conv(x, weight, bias, self.stride, padding, self.dilation, False, unpadded, self.groups, offsets)


class FoldedConvTranspose(_Convolves):
    """Transposed convolutions of all members, in one to three dimensions."""

    def fold_forward(self, x: Tensor, offsets: Tensor | None, /, output_size: list[int] | None = None) -> Tensor:
        """Evaluate ``x`` [R, C_in, *space] -> [R, C_out, *space']."""
        weight = self.stack("weight")
        space = weight.ndim - 3
        if x.ndim != space + 2:
            raise NotFoldable(f"input of {x.ndim} dimensions to a {space}-d convolution")
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, space, self.dilation
        )
        bias, groups = self.stack("bias"), self.groups
        return self._conv(
            x, weight, bias, self.stride, self.padding, self.dilation, True, output_padding, groups, offsets
        )


for _layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_layer, FoldedConv)
for _layer in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_layer, FoldedConvTranspose)


def _numbers(value: int | Sequence[int], space: int) -> tuple[int, ...]:
    return (value,) * space if isinstance(value, int) else tuple(value) * (space if len(value) == 1 else 1)


def _plain(space: int) -> Callable[..., Any]:
    def folded(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        if not isinstance(weight, MemberTensor) or isinstance(padding, str):
            return NotImplemented
        numbers = [_numbers(value, space) for value in (stride, padding, dilation)]

        def run(x: Tensor, offsets: Tensor | None) -> Tensor:
            rest = (*numbers, False, (0,) * space, groups, offsets)
            arguments = (x, weight.stack, stack_of(bias, weight), *rest)
            return conv(*arguments, way=_way(arguments, weight.rows))

        return call_op(run, input, weight.rows)

    return folded


def _transposed(space: int) -> Callable[..., Any]:
    def folded(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not isinstance(weight, MemberTensor):
            return NotImplemented
        strides, paddings, dilations, output_paddings = (
            _numbers(value, space) for value in (stride, padding, dilation, output_padding)
        )
        return call_op(
            lambda x, offsets: conv(
                x,
                weight.stack,
                stack_of(bias, weight),
                strides,
                paddings,
                dilations,
                True,
                output_paddings,
                groups,
                offsets,
            ),
            input,
            weight.rows,
        )

    return folded


for _space, _function in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1):
    folds(_function)(_plain(_space))
for _space, _function in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1):
    folds(_function)(_transposed(_space))
