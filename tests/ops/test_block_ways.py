"""Ways of a convolution with a residual block's operations around it: they agree, and each shape has its own entry."""

import pytest
import torch

from fastens.ops._block_ways import CHOICE
from fastens.ops._conv_kernels import WIDE_OUTPUTS
from fastens.ops._tma_ways import Call
from fastens.ops.group_moments import group_moments
from fastens.plan.gpu import calls
from fastens.program.block import ConvBlock
from tests.tolerances import OP, relative_error

K, B, C, OUT, SIZE = 2, 2, 8, 16, 5


def last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def arguments(kind, into=None, moments=None):
    torch.manual_seed(0)
    x, taps = last(K * B, C, SIZE, SIZE), 3
    weight = torch.randn(K, OUT, C, taps, taps)
    stride, padding, size = {"strided": ((2, 2), (0, 0), (3, 3))}.get(kind, ((1, 1), (1, 1), (SIZE, SIZE)))
    around = {}
    if kind == "skip":  # 12 channels in 2 groups of 3 parts, of which x has 4 and skip has 2
        skip = last(K * B, 4, SIZE, SIZE)
        weight = torch.randn(K, OUT, C + 4, taps, taps)
        around = {"moments": group_moments(x, 4), "skip": skip, "skip_moments": group_moments(skip, 2),
                  "norm_groups": 2}  # fmt: skip
    if kind == "block":
        around = {
            "moments": group_moments(x, 4), "norm_weight": torch.randn(K, C), "norm_bias": torch.randn(K, C),
            "scale": torch.randn(K * B, C), "shift": torch.randn(K * B, C), "activation": "silu",
            "row_bias": torch.randn(K * B, OUT), "residual": last(K * B, OUT, *size), "output_scale": 0.7,
            "num_groups": 4,
        }  # fmt: skip
    return Call(ConvBlock.of(x, weight, torch.randn(K, OUT), stride, padding, **around), size, into, moments)


@pytest.mark.parametrize("kind", ["plain", "strided", "skip", "block"])
@pytest.mark.parametrize("way", ["triton", "triton narrow"])
def test_ways_agree_where_they_write(kind, way):
    pytest.importorskip("triton")
    expected = CHOICE.ways["library"].run(*arguments(kind))
    for name in ("library", way):
        into = torch.full(expected.shape, float("nan")).contiguous(memory_format=torch.channels_last)
        found = torch.full((K * B, 4, 1, 2), float("nan")) if kind == "block" else None
        call = arguments(kind, into, found)
        assert CHOICE.ways[name].refuses(*call) is None
        assert CHOICE.ways[name].run(*call).data_ptr() == into.data_ptr()
        assert relative_error(into, expected) < OP[torch.float32]
        assert found is None or relative_error(found, group_moments(expected, 4)) < OP[torch.float32]


def test_what_is_around_a_convolution_is_measured_apart():
    keys = {CHOICE.key(*arguments(kind)) for kind in ("plain", "strided", "skip", "block")}
    assert len(keys) == 4
    assert "skip4 norm2" in CHOICE.key(*arguments("skip"))
    assert "norm4 by row silu row bias residual moments4" in CHOICE.key(*arguments("block"))


def test_what_the_kernel_does_not_take_goes_to_the_library():
    call, beside = arguments("plain"), arguments("skip")
    block = call.block.replace(x=call.block.x.contiguous())
    skip = beside.block.prologue.skip.contiguous()
    assert "channels are not last" in CHOICE.ways["triton"].refuses(block, call.size)
    assert "channels are not last" in CHOICE.ways["triton"].refuses(beside.block.replace(skip=skip), call.size)
    assert "no more outputs" in CHOICE.ways["triton wide"].refuses(*call)
    wide = call.block.weight.new_empty(K, 2 * WIDE_OUTPUTS, *call.block.weight.shape[2:])
    assert "so many images" in CHOICE.ways["triton wide"].refuses(
        call.block._replace(weight=wide, bias=None), call.size
    )
    assert CHOICE.ways["triton wide"].refuses(call.block._replace(weight=wide, bias=None), (8, 8)) is None
    out = torch.empty(K * B, OUT, SIZE, SIZE)
    calls.conv2d(out, block, None, "triton")
    assert relative_error(out, CHOICE.ways["library"].run(*call)) < OP[torch.float32]
