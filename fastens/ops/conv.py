"""Member-batched convolution in one, two or three dimensions, plain or transposed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops import _conv_kernels, _conv_ways
from fastens.ops._choice import Choice, Way
from fastens.ops._dispatch import Op
from fastens.ops._rows import check_rows, check_stack
from fastens.ops._tma_ways import TILINGS
from fastens.ops.conv2d import output_size
from fastens.reference import conv as reference


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *_: object
) -> Tensor:
    last = x.ndim == 4 and _conv_ways.channels_last(x)
    size = (x.shape[0], weight.shape[1], *output_size(x, weight, stride, padding))
    return x.new_empty(size).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


_conv = Op(
    "conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool transposed, SymInt[] output_padding, SymInt groups, Tensor? offsets=None) -> Tensor",
    reference.conv,
    {"native": _fake},
)


def _native(x: Tensor, *arguments: object) -> Tensor:
    return _conv.resolve("native", [x])(x, *arguments)


# "members" is one library call per member. On a GPU the faster way is found by measurement, on a CPU by a rule: there
# "native" is the convolution step of the plans, for passes that have none.
CHOICE = Choice(
    "conv",
    _conv_ways.key,
    {
        "members": Way(_conv.default),
        "native": Way(_native, _conv_ways.refuses_native),
        "grouped": Way(_conv_ways.grouped, _conv_ways.refuses_grouped),
        "matmul": Way(_conv_ways.matmul, _conv_ways.refuses_matmul),
        "triton": Way(_conv_kernels.run("auto"), _conv_kernels.refuses("auto")),
        "triton narrow": Way(_conv_kernels.run("narrow"), _conv_kernels.refuses("narrow")),
        "triton wide": Way(_conv_kernels.run("wide"), _conv_kernels.refuses("wide")),
        **{name: Way(_conv_kernels.run_tma(name), _conv_kernels.refuses_conv_tma(name)) for name in TILINGS},
    },
    rule=_conv_ways.rule,
)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    transposed: bool = False,
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    offsets: Tensor | None = None,
    *,
    way: str = "auto",
) -> Tensor:
    """Convolve each member's rows with its own kernels.

    Args:
        x: [R, C_in, *space], rows grouped by member; one to three space dimensions.
        weight: [K, C_out, C_in / groups, *kernel]; transposed: [K, C_in, C_out / groups, *kernel].
        bias: [K, C_out], or none.
        stride: one number per space dimension, as padding, dilation and output_padding.
        padding: zeros added on both sides.
        dilation: distance between kernel elements.
        transposed: the gradient of a convolution with respect to its input.
        output_padding: extra size on one side of a transposed convolution's output.
        groups: blocks of channels within each member.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        way: the library calls that compute it, a name in ``CHOICE.ways``; ``"auto"`` takes what measures best.

    Returns:
        [R, C_out, *space'].

    Raises:
        ValueError: rows that cannot be dealt out to the members, or parameter shapes that do not fit; a way
            that is unknown or does not take these arguments.
    """
    if weight.ndim != x.ndim + 1:
        raise ValueError(f"conv: weight is {list(weight.shape)} and x {list(x.shape)}, expected a member axis more")
    check_rows("conv", x, weight.shape[0], offsets)
    channels_in = weight.shape[1] if transposed else weight.shape[2] * groups
    channels_out = weight.shape[2] * groups if transposed else weight.shape[1]
    if x.shape[1] != channels_in:
        raise ValueError(f"conv: x has {x.shape[1]} channels, weight expects {channels_in}")
    check_stack("conv", "bias", bias, (weight.shape[0], channels_out))
    arguments = (x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, offsets)
    return CHOICE.ways[CHOICE.choose(arguments, x.device, way)].run(*arguments)
