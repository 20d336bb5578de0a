"""Kernels of tensor descriptors, and passes before them: every shape is taken by some way, and all that do agree."""

import pytest
import torch

from fastens.ops._block_ways import CHOICE
from fastens.ops._tma_ways import HALO, TILINGS, Call, fills_less_than
from fastens.ops.conv2d import output_size
from fastens.ops.group_moments import group_moments
from fastens.program.block import ConvBlock
from tests.ops.cases import interpreted, needs_triton
from tests.ops.convolutions import conv2d
from tests.ops.convolutions import in_double as doubled
from tests.tolerances import OP, relative_error

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AROUND = ("row_bias", "residual", "moments", "silu")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.double).to(dtype)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def block(
    dtype, members, rows, channels, outputs, size, taps=3, stride=1, padding=1, norm=0, skip=0, groups=0, around=(),
    below=0, weights="last",
):  # fmt: skip
    """Arguments of the ways: groups of the norm of all channels, and of the output; more zeros below."""
    torch.manual_seed(0)
    total = channels + skip
    x = last(2 * normal(rows, channels, *size, dtype=dtype) + 1)
    beyond = last(normal(rows, skip, *size, dtype=dtype)) if skip else None
    weight = normal(members, outputs, taps, taps, total, dtype=dtype).movedim(-1, 2) / (taps * total**0.5)
    weight = weight.contiguous() if weights == "first" else weight
    out = tuple(n + below // stride for n in output_size(x, weight, (stride,) * 2, (padding,) * 2))
    moments = beyond_moments = norm_weight = norm_bias = scale = shift = None
    if norm:
        parts = total // norm // 2 if skip else total // norm
        moments = group_moments(x, channels // parts, backend="reference")
        beyond_moments = group_moments(beyond, skip // parts, backend="reference") if skip else None
        norm_weight, norm_bias = normal(members, total, dtype=dtype), normal(members, total, dtype=dtype)
        scale, shift = normal(rows, total, dtype=dtype), normal(rows, total, dtype=dtype)
    row_bias = normal(rows, outputs, dtype=dtype) if "row_bias" in around else None
    residual = last(normal(rows, outputs, *out, dtype=dtype)) if "residual" in around else None
    block = ConvBlock.of(
        x, weight, normal(members, outputs, dtype=dtype), (stride,) * 2, (padding,) * 2, moments=moments,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=1e-3, scale=scale, shift=shift,
        activation="silu" if norm else "none", row_bias=row_bias, residual=residual, output_scale=0.7,
        output_activation="silu" if "silu" in around else "none", num_groups=groups, skip=beyond,
        skip_moments=beyond_moments, norm_groups=norm if skip else 0,
    )  # fmt: skip
    return Call(block, out)


def in_double(call):
    return call._replace(block=ConvBlock.from_flat(doubled(call.block.flat())))


# name -> arguments of block, and whether the kernel of descriptors takes it, in float16 and in float32
CASES = {
    "uneven": (dict(members=2, rows=4, channels=16, outputs=24, size=(5, 7), around=AROUND, groups=3), True),
    "rows that overhang": (dict(members=2, rows=6, channels=8, outputs=16, size=(4, 4), around=AROUND, groups=4), True),
    "17 members": (dict(members=17, rows=17, channels=8, outputs=5, size=(2, 2)), True),
    "one place": (dict(members=2, rows=4, channels=8, outputs=6, size=(1, 1)), True),
    "spans of whole lines": (dict(members=1, rows=2, channels=8, outputs=16, size=(12, 32), groups=4), True),
    "lines of whole spans": (dict(members=1, rows=1, channels=8, outputs=8, size=(1, 256), groups=2), True),
    "lines that are no power of two": (dict(members=1, rows=2, channels=8, outputs=12, size=(13, 12), groups=3), True),
    "channels beyond a step": (dict(members=2, rows=2, channels=72, outputs=20, size=(3, 5)), True),
    "many outputs": (dict(members=2, rows=2, channels=8, outputs=136, size=(9, 15), groups=17), True),
    "many outputs of a block": (
        dict(members=2, rows=2, channels=8, outputs=200, size=(9, 15), around=AROUND, groups=25), True,
    ),
    "a group beyond a part": (dict(members=1, rows=1, channels=8, outputs=256, size=(8, 16), groups=1), True),
    "groups that are no power of two": (dict(members=2, rows=2, channels=8, outputs=6, size=(4, 3), groups=2), True),
    "stride": (dict(members=3, rows=3, channels=64, outputs=8, size=(6, 10), stride=2, around=AROUND, groups=2), True),
    "stride, zeros below": (
        dict(members=2, rows=2, channels=64, outputs=8, size=(6, 4), stride=2, padding=0, below=2), True,
    ),
    "stride over odd lines": (dict(members=1, rows=2, channels=64, outputs=8, size=(6, 5), stride=2), False),
    "stride over few channels": (dict(members=1, rows=2, channels=8, outputs=8, size=(6, 6), stride=2), False),
    "1x1": (dict(members=2, rows=4, channels=24, outputs=16, size=(5, 6), taps=1, padding=0, groups=2), True),
    "1x1 with padding": (dict(members=2, rows=2, channels=8, outputs=4, size=(3, 2), taps=1, padding=1), True),
    "no padding": (dict(members=1, rows=2, channels=8, outputs=4, size=(6, 9), padding=0), True),
    "5x5": (dict(members=2, rows=2, channels=8, outputs=4, size=(6, 7), taps=5, padding=2), True),
    "three channels": (dict(members=2, rows=2, channels=3, outputs=8, size=(4, 5)), False),
    "weights with space innermost": (
        dict(members=2, rows=2, channels=8, outputs=8, size=(4, 5), weights="first"), False,
    ),
    "block": (dict(members=2, rows=4, channels=16, outputs=16, size=(5, 7), norm=4, around=AROUND, groups=4), True),
    "block of several spans": (dict(members=1, rows=2, channels=8, outputs=8, size=(13, 12), norm=2, groups=2), True),
    "many spans before": (
        dict(members=1, rows=1, channels=8, outputs=4, size=(48, 46), taps=1, padding=0, norm=2), True,
    ),
    "skip": (dict(members=2, rows=4, channels=24, outputs=8, size=(3, 4), skip=16), True),
    "skip and a norm that straddles": (
        dict(members=2, rows=4, channels=32, outputs=8, size=(5, 4), skip=16, norm=6, around=AROUND, groups=2), True,
    ),
}  # fmt: skip


# every case in float32 and in one of the dtypes of 16 bits, which the kernels do not tell apart: in turn the one here
# and the other interpreted elsewhere
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=interpreted if (i + wide) % 2 else ())
        for i, name in enumerate(CASES)
        for wide, dtype in enumerate((DTYPES[1 + i // 2 % 2], torch.float32))
    ],
    ids=str,
)
def test_every_shape_is_taken_and_all_that_take_it_agree(name, dtype):
    shape, descriptors = CASES[name]
    call = block(dtype, **shape)
    expected = CHOICE.ways["library"].run(*in_double(call))
    taken = [way for way in CHOICE.ways if CHOICE.ways[way].refuses(*call) is None]
    assert taken[0] == "library"
    assert ("tma 64x128" in taken, "tma 128x128" in taken) == (descriptors, descriptors)
    wide = shape["outputs"] > 128 and dtype != torch.float32
    assert ("tma 128x256" in taken) is wide
    assert ("triton apart" in taken) is bool(shape.get("norm") or shape.get("skip"))
    groups = shape.get("groups", 0)
    for way in taken:
        into = last(torch.full(expected.shape, torch.nan, dtype=dtype))
        spans = -(-expected[0, 0].numel() // 128)
        found = torch.full((len(into), groups, spans, 2), torch.nan) if groups else None
        assert CHOICE.ways[way].run(*call[:2], into, found).data_ptr() == into.data_ptr()
        assert relative_error(into, expected) <= OP[dtype], way
        if groups:  # of the result as it is stored
            assert relative_error(found, group_moments(into, groups, backend="reference")) <= 1e-5, way


def test_a_partial_step_takes_nothing_of_the_next_tap():
    """A step's channels beyond the last are zero in both operands: no infinity meets a zero there."""
    own, size, *_ = block(torch.bfloat16, 1, 1, 24, 8, (5, 5), padding=0)
    own.weight[:, :, :, 0, 1] = torch.inf
    call = Call(own.replace(x=own.x.abs() + 1), size)
    assert torch.equal(CHOICE.ways["tma 128x128"].run(*call), torch.full((1, 8, 3, 3), torch.inf, dtype=torch.bfloat16))


def test_why_descriptors_are_refused_is_said(monkeypatch):
    def why(change=lambda x: x, tiling="tma 128x128", **shape):
        sizes = {"members": 1, "rows": 2, "channels": 64, "outputs": 8, "size": (4, 4), **shape}
        own, size, *_ = block(sizes.pop("dtype", torch.bfloat16), **sizes)
        return CHOICE.ways[tiling].refuses(own.replace(x=change(own.x)), size)

    def shifted(x):
        return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(2, 4, 4, 64).movedim(-1, 1)

    assert why() is None
    assert "no multiples of 16 bytes" in why(channels=4)
    assert "no multiples of 16 bytes" in why(shifted)
    assert "a dtype without" in why(dtype=torch.double)
    assert "no more outputs" in why(tiling="tma 128x256")
    assert "more sums" in why(tiling="tma 128x256", outputs=256)
    assert "odd" in why(size=(4, 5), stride=2)
    assert "stride of 2 over channels" in why(channels=32, stride=2)
    assert "image or weights" in why(weights="first")
    assert "not last in memory" in why(torch.Tensor.contiguous)
    assert "nothing before" in why(tiling="triton apart")
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert "full precision" in why(dtype=torch.float32)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # allow_tf32 raises from here on
    try:
        assert "full precision" in why(dtype=torch.float32)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "descriptor" in name else name)
    assert "without tensor descriptors" in why()


def test_why_lines_for_three_taps_are_refused_is_said(monkeypatch):
    def why(**shape):
        sizes = {"members": 1, "rows": 1, "channels": 64, "outputs": 128, "size": (16, 16), **shape}
        return CHOICE.ways[HALO].refuses(*block(sizes.pop("dtype", torch.bfloat16), **sizes))

    assert "its interpreter" in why()
    monkeypatch.setattr("fastens.ops._tma_ways.interpreting", lambda: False)
    assert why() is None
    assert why(size=(8, 32), outputs=256, norm=4, around=AROUND, groups=8) is None
    assert why(size=(4, 64), channels=24, skip=8) is None
    assert "no multiples of 16 bytes" in why(channels=4)
    assert "other than bfloat16" in why(dtype=torch.float16)
    assert "other than 3x3" in why(taps=1, padding=0)
    assert "other than 3x3" in why(padding=0)
    assert "other than 3x3" in why(stride=2)
    for size in ((8, 8), (15, 16), (4, 128)):
        assert "no whole tiles of lines" in why(size=size)
    assert "no whole tiles" in why(outputs=96)
    own, size, *_ = block(torch.bfloat16, 1, 1, 64, 128, (16, 16))
    assert "other than SiLU" in CHOICE.ways[HALO].refuses(own.replace(output_activation="gelu"), size)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "gluon" in name else name)
    assert "without Gluon" in why()


def test_what_lies_otherwise_than_what_was_measured_is_copied():
    """Choices are remembered by shape, so that a way may meet an image that it refuses."""
    call = block(torch.float16, 2, 4, 16, 8, (4, 5))
    own = call.block
    shifted = torch.empty(own.x.numel() + 1, dtype=own.x.dtype)[1:].view(4, 4, 5, 16).movedim(-1, 1)
    otherwise = Call(own.replace(x=shifted.copy_(own.x), weight=own.weight.contiguous()), call.size)
    way = CHOICE.ways["tma 128x128"]
    assert way.refuses(*otherwise) is not None
    assert torch.equal(way.run(*otherwise), way.run(*call))


@pytest.mark.parametrize("tiling", TILINGS)
def test_plain_convolutions_take_it_too(tiling):
    from fastens.ops import conv

    own = block(torch.float16, 2, 4, 40, 136, (9, 15)).block[:5]
    plain = (*own, (1, 1), False, (0, 0), 1, None)
    expected, _ = conv2d(*doubled(own), backend="reference")
    assert relative_error(conv.conv(*own, way=tiling), expected) <= OP[torch.float16]
    assert "unequal" in conv.CHOICE.ways[tiling].refuses(*plain[:-1], torch.tensor([0, 1, 4]))


@pytest.mark.parametrize(("rows", "outputs", "tiles"), [(5, 256, 80), (10, 256, 160), (5, 130, 80), (5, 128, 40)])
def test_tiles_are_counted(rows, outputs, tiles):
    x, weight = torch.empty(rows, 8, 32, 32), torch.empty(5, outputs, 8, 3, 3)
    block = ConvBlock(x, weight, padding=(1, 1))
    assert fills_less_than(block, (32, 32), tiles)
    assert not fills_less_than(block, (32, 32), tiles - 1)
