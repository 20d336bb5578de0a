"""Our kernel among the ways of a convolution: whatever is convolved, some way takes it, and all that do agree."""

import itertools

import pytest
import torch
from torch import nn

import fastens
from fastens.ops import conv
from tests.ops.cases import needs_triton
from tests.tolerances import NETWORK, OP, relative_error

KERNEL_WAYS = ("triton", "triton narrow", "triton wide")
X, W = (4, 3, 5, 6), (2, 4, 3, 3, 3)
SETTINGS = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def shapes():
    """Every kind of convolution that a folded layer calls for: kernel size, stride, padding, channels, rows, layout."""
    for taps, stride, padding, channels, outputs in itertools.product((1, 3), (1, 2), (0, 1), (1, 5), (1, 6)):
        yield (
            f"{taps}x{taps} s{stride} p{padding} {channels} to {outputs}",
            dict(
                x=(4, channels, 5, 6),
                w=(2, outputs, channels, taps, taps),
                stride=(stride,) * 2,
                padding=(padding,) * 2,
            ),
        )
    yield "uneven", dict(x=(2, 4, 7, 5), w=(2, 3, 4, 3, 2), stride=(2, 1), padding=(1, 0))
    yield "5x5", dict(x=(2, 4, 7, 5), w=(2, 3, 4, 5, 5), padding=(2, 2))
    yield "members alone", dict(x=(17, 2, 3, 3), w=(17, 2, 2, 3, 3))
    yield "many outputs", dict(x=(2, 2, 2, 2), w=(2, 130, 2, 1, 1), padding=(0, 0))
    yield "channels last", dict(x=X, w=W, layout="last")
    yield "ragged", dict(x=X, w=W, offsets=(0, 1, 4))
    yield "no rows", dict(x=(0, *X[1:]), w=W)
    yield "one place", dict(x=(4, 3, 1, 1), w=W)
    yield "dilated", dict(x=X, w=W, dilation=(2, 1))
    yield "groups of channels", dict(x=(4, 6, 5, 5), w=(2, 4, 3, 3, 3), groups=2)
    yield "transposed", dict(x=(4, 4, 5, 6), w=W, transposed=True)
    yield "one dimension", dict(x=(4, 3, 9), w=(2, 4, 3, 3), stride=(1,), padding=(1,), dilation=(1,), output=(0,))
    space = dict(stride=(1,) * 3, padding=(1,) * 3, dilation=(1,) * 3, output=(0,) * 3)
    yield "three dimensions", dict(x=(2, 3, 3, 4, 3), w=(2, 2, 3, 3, 3, 3), **space)


NOT_OURS = {"dilated", "groups of channels", "transposed", "one dimension", "three dimensions", "no rows"}


def arguments(x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1), transposed=False, output=(0, 0), groups=1,
              offsets=None, layout=""):  # fmt: skip
    torch.manual_seed(0)
    value, weight = torch.randn(x), torch.randn(w)
    if layout == "last":
        value = value.contiguous(memory_format=torch.channels_last)
        weight = weight.movedim(2, -1).contiguous().movedim(-1, 2)
    bias = torch.randn(w[0], w[2] * groups if transposed else w[1])
    offsets = None if offsets is None else torch.tensor(offsets)
    return value, weight, bias, stride, padding, dilation, transposed, output, groups, offsets


@needs_triton
@pytest.mark.parametrize(("name", "shape"), [pytest.param(name, shape, id=name) for name, shape in shapes()])
def test_every_shape_is_taken_and_all_that_take_it_agree(name, shape):
    call = arguments(**shape)
    expected = conv.conv(*call, way="members")
    taken = [way for way in conv.CHOICE.ways if conv.CHOICE.ways[way].refuses(*call) is None]
    assert taken[0] == "members"  # the library's takes everything
    assert ("triton" in taken) is (name not in NOT_OURS)
    assert ("triton wide" in taken) is (name == "many outputs")
    for way in taken[1:]:
        actual = conv.conv(*call, way=way)
        assert relative_error(actual, expected) <= OP[torch.float32], way
        assert actual.stride() == expected.stride() or way == "matmul" or 1 in expected.shape[1:], way
    for way in set(KERNEL_WAYS) - set(taken):
        with pytest.raises(ValueError, match="does not take"):
            conv.conv(*call, way=way)


@needs_triton
def test_dtypes_that_the_kernel_has_not_go_to_the_library():
    call = arguments(X, W)
    assert "dtype" in conv.CHOICE.ways["triton"].refuses(call[0].to(torch.complex64), *call[1:])
    assert "dtype" in conv.CHOICE.ways["triton"].refuses(call[0].double(), *call[1:])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Conv2d(4, 3, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


@needs_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_whose_convolutions_are_ours(monkeypatch, layout):
    torch.manual_seed(0)
    members = [Block().to(memory_format=layout) for _ in range(3)]
    ensemble = fastens.Ensemble(members, backend="reference").eval()
    x = torch.randn(2, 3, 6, 6).to(memory_format=layout)
    expected = torch.stack([member(x) for member in members]).mean(0)
    monkeypatch.setenv("FASTENS_CHOOSE", "conv=triton")
    with torch.no_grad():
        assert relative_error(ensemble(x), expected) <= NETWORK[torch.float32]
    assert [layer.backend for layer in ensemble.report().layers if "Conv" in layer.layer] == [
        "triton", "triton", "members", "triton",
    ]  # fmt: skip
    weight = next(p for name, p in ensemble.named_parameters() if name.endswith("0.weight"))
    assert weight[0].is_contiguous(memory_format=layout)
    loss = ensemble(x).square().sum()
    loss.backward()
    gradient = weight.grad[1].clone()
    members[1].zero_grad()
    torch.stack([member(x) for member in members]).mean(0).square().sum().backward()
    assert relative_error(gradient, members[1].net[0].weight.grad) <= NETWORK[torch.float32]
