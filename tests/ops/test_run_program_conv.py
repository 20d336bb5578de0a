"""Convolution steps: the kernels against the reference and against torch."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastens import _native
from fastens.ops.run_program import available
from fastens.plan.cpu.packing import multiplies_bfloat16, pack, packed_size
from fastens.program import steps
from fastens.program.steps import Activation, Image, Mask, Slot
from tests.ops.programs import Memory, assert_close, random
from tests.tolerances import OP

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")
CHANNELS = (1, 3, 17, 20, 37, 40, 70, 130)
ACTIVATIONS = {
    Activation.NONE: lambda x: x,
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


@dataclasses.dataclass
class Case:
    """A convolution and how it is cut into tasks; `copies` of the source serve the rows in turn, 0 for one each."""

    members: int = 2
    rows_per_member: int = 3
    in_channels: tuple[int, ...] = (17,)
    out_channels: int = 20
    size: tuple[int, int] = (7, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    up: int = 1
    copies: int = 0
    tables: bool = False
    act_in: Activation = Activation.NONE
    bias: bool = True
    row_vector: bool = False
    residual: bool = False
    scale: float = 1.0
    divisor: float = 1.0
    act_out: Activation = Activation.NONE
    row_chunk: int = 3
    band: int = 100
    block_chunk: int = 100
    vectors: int = 2
    num_threads: int = 1
    poison: tuple[int, float] | None = None  # a row and what its source is filled with
    bfloat16: bool = False
    squares: int = 0  # pixels on a side of Winograd's squares
    given: tuple[int, ...] | None = None  # the members of the runs of rows, where they do not come in turn
    chunks: int = 0  # of rows; 0 for as many as there are where the members given come in order
    masks: tuple[bool, bool] = (False, False)  # on the way in and out: of the members in turn; of each row


def check(**changes):
    """Run a case by the kernels, the reference and torch; return the result [R, C_out, H, W]."""
    case = Case(**changes)
    memory = Memory()
    given = tuple(range(case.members)) if case.given is None else case.given
    rows, channels = len(given) * case.rows_per_member, sum(case.in_channels)
    low = [random(case.copies or rows, c, *case.size, seed=i) for i, c in enumerate(case.in_channels)]
    if case.poison is not None:
        low = [x.clone() for x in low]
        low[0][case.poison[0]] = case.poison[1]
    x = torch.cat(low, 1)[torch.arange(rows) % len(low[0])].double()
    scale, shift = random(rows, channels, seed=1), random(rows, channels, seed=2)
    if case.tables:
        x = x * scale[:, :, None, None].double() + shift[:, :, None, None].double()
    x = ACTIVATIONS[case.act_in](x)
    mask_in = mask_out = Mask()
    if case.masks[0]:
        mask_in, kept = memory.mask(case.members, channels, *case.size, 1.25, case.rows_per_member, given)
        x = x * kept
    x = x.repeat_interleave(case.up, 2).repeat_interleave(case.up, 3)
    in_h, in_w = x.shape[2:]
    x = F.pad(x, case.padding)
    weight = random(case.members, case.out_channels, channels, *case.kernel)
    packed = torch.empty(packed_size(weight.shape, case.bfloat16, case.squares))
    pack(weight, case.vectors, case.bfloat16, packed, case.squares)
    if case.bfloat16:
        x, weight = x.bfloat16().double(), weight.bfloat16().float()
    bias = random(case.members, case.out_channels)
    y = torch.cat(
        [
            F.conv2d(x_k, weight[k].double(), bias[k].double() if case.bias else None, case.stride)
            for x_k, k in zip(x.split(case.rows_per_member), given, strict=True)
        ]
    )
    out_h, out_w = y.shape[2:]
    vector = random(rows, case.out_channels + 7)[:, : case.out_channels]
    residual = random(rows, case.out_channels, out_h, out_w)
    if case.row_vector:
        y = y + vector[:, :, None, None].double()
    if case.masks[1]:
        mask_out, kept = memory.mask(rows, case.out_channels, out_h, out_w, 2.0)
        y = y * kept
    if case.residual:
        y = y + residual.double()
    expected = ACTIVATIONS[case.act_out](y * case.scale / case.divisor)

    padded = -(-case.out_channels // steps.LANES) * steps.LANES
    blocks = -(-padded // (case.vectors * steps.LANES))
    row_chunk, band, block_chunk = (
        min(case.row_chunk, case.rows_per_member if case.given is None else rows),
        min(case.band, out_h),
        min(case.block_chunk, blocks),
    )
    chunks = case.chunks or sum(-(-given.count(k) * case.rows_per_member // row_chunk) for k in set(given))
    tasks = chunks * -(-out_h // band) * -(-blocks // block_chunk)
    sources = [memory.image(source) for source in low] + [Image()]
    out, view = memory.image_room(rows, case.out_channels, out_h, out_w)
    kind = functools.partial(steps.Winograd, tile=case.squares) if case.squares else steps.Conv
    step = kind(
        rows,
        case.rows_per_member,
        row_chunk,
        band,
        block_chunk,
        case.vectors,
        (sources[0], sources[1]),
        case.up,
        in_h,
        in_w,
        *case.kernel,
        *case.stride,
        case.padding[2],
        case.padding[0],
        out_h,
        out_w,
        case.out_channels,
        memory.put(scale) if case.tables else steps.NONE,
        memory.put(shift) if case.tables else steps.NONE,
        int(case.act_in),
        memory.put(packed, Slot.WEIGHTS),
        packed.numel() // case.members,
        memory.put(F.pad(bias, (0, padded - case.out_channels)), Slot.WEIGHTS) if case.bias else steps.NONE,
        padded,
        memory.put(F.pad(vector, (0, 7), value=torch.nan)) if case.row_vector else steps.NONE,
        case.out_channels + 7,
        memory.image(residual) if case.residual else Image(),
        case.scale,
        int(case.act_out),
        out,
        int(case.bfloat16),
        steps.NONE if case.given is None else memory.put_members(case.given),
        mask_in,
        mask_out,
        case.divisor,
        tasks=tasks,
    )
    # a value that was computed in another order may round to the next bfloat16
    rounds = case.bfloat16 and (case.tables or case.act_in is not Activation.NONE)
    tolerance = OP[torch.bfloat16 if rounds else torch.float32]
    (actual,) = memory.check(step, view, num_threads=case.num_threads, tolerance=tolerance)
    assert_close(actual, expected, tolerance)
    return actual


@pytest.mark.parametrize("in_channels", CHANNELS)
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_channels(in_channels, out_channels):
    for kernel, padding in (((3, 3), (1, 1, 1, 1)), ((1, 1), (0, 0, 0, 0))):
        for vectors in (1, 2, 3, 4):
            check(
                in_channels=(in_channels,),
                out_channels=out_channels,
                kernel=kernel,
                padding=padding,
                vectors=vectors,
                size=(3, 5),
                rows_per_member=1,
            )


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("num_pixels", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 18, 20, 24, 25, 30])
def test_tiles_of_pixels(vectors, num_pixels):
    for kernel, padding in (((1, 1), (0, 0, 0, 0)), ((1, 3), (1, 1, 0, 0))):
        check(size=(1, num_pixels), kernel=kernel, padding=padding, out_channels=70, vectors=vectors, row_chunk=1)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3), (1, 1), (0, 0, 0, 0)),
        ((3, 3), (2, 2), (1, 1, 1, 1)),
        ((3, 3), (2, 2), (0, 1, 0, 1)),  # as the downsampling of DDPM pads
        ((3, 3), (1, 2), (2, 0, 1, 3)),
        ((3, 1), (2, 1), (0, 0, 1, 1)),
        ((1, 3), (1, 1), (1, 1, 0, 0)),
        ((2, 2), (2, 2), (0, 0, 0, 0)),
        ((4, 4), (2, 2), (1, 1, 1, 1)),
        ((5, 5), (1, 1), (2, 2, 2, 2)),
        ((7, 7), (1, 1), (3, 3, 3, 3)),
        ((1, 1), (2, 2), (0, 0, 0, 0)),
        ((1, 1), (1, 1), (0, 1, 0, 1)),
        ((1, 1), (1, 1), (0, 3, 0, 0)),
        ((1, 1), (2, 3), (1, 0, 2, 0)),
        ((7, 5), (7, 5), (0, 0, 0, 0)),  # patches
    ],
)
@pytest.mark.parametrize("band", [1, 2, 100])
def test_windows(kernel, stride, padding, band):
    check(kernel=kernel, stride=stride, padding=padding, band=band)


@pytest.mark.covering(2)
@pytest.mark.parametrize("row_chunk", [1, 2, 3])
@pytest.mark.parametrize("band", [1, 2, 3, 7])
@pytest.mark.parametrize("block_chunk", [1, 2, 5])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_cuts(row_chunk, band, block_chunk, num_threads):
    check(row_chunk=row_chunk, band=band, block_chunk=block_chunk, out_channels=70, num_threads=num_threads)


@pytest.mark.parametrize(("members", "rows_per_member"), [(1, 1), (1, 4), (3, 1), (5, 2), (17, 3)])
def test_members_and_rows(members, rows_per_member):
    check(members=members, rows_per_member=rows_per_member, row_chunk=2, num_threads=2)


@pytest.mark.parametrize("given", [(0,), (2,), (0, 0, 1, 2, 2), (2, 0, 1, 1, 0, 2), (1,) * 7])
@pytest.mark.parametrize("rows_per_member", [1, 3])
@pytest.mark.parametrize("row_chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("chunks", [0, 1, 40])
def test_rows_of_given_members(given, rows_per_member, row_chunk, chunks):
    """Whose rows they are is read when the program runs. Chunks too many are empty; of too few the last takes all."""
    cut = {"row_chunk": row_chunk, "block_chunk": 1, "num_threads": 2, "chunks": chunks}
    check(members=3, given=given, rows_per_member=rows_per_member, out_channels=70, row_vector=True, **cut)
    check(members=3, given=given, rows_per_member=rows_per_member, kernel=(1, 1), padding=(0, 0, 0, 0), **cut)


@pytest.mark.parametrize("in_channels", [(17, 20), (16, 1), (3, 130), (1, 1), (32, 32)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("tables", [False, True])
def test_joined_and_enlarged_sources(in_channels, kernel, up, tables):
    for channels in (in_channels, in_channels[:1]):
        padding = (kernel // 2,) * 4
        check(in_channels=channels, kernel=(kernel, kernel), padding=padding, up=up, tables=tables, band=4)


def test_enlarged_source_with_a_stride():
    check(up=2, stride=(2, 2))
    check(up=3, kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2))


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_that_share_a_source(copies):
    check(copies=copies)
    check(copies=copies, kernel=(1, 1), padding=(0, 0, 0, 0))


@pytest.mark.parametrize("act_in", Activation)
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_prologues(act_in, tables, kernel):
    for in_channels in (3, 16, 37):
        check(act_in=act_in, tables=tables, kernel=(kernel, kernel), in_channels=(in_channels,), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("act_out", Activation)
@pytest.mark.parametrize("scale", [1.0, 0.7071067811865475])
def test_epilogues(act_out, scale):
    for bias, row_vector, residual in itertools.product((False, True), repeat=3):
        check(act_out=act_out, scale=scale, bias=bias, row_vector=row_vector, residual=residual, num_threads=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_bad_row_stays_alone(value, kernel):
    padding = (kernel // 2,) * 4
    clean = check(kernel=(kernel, kernel), padding=padding)
    bad = check(kernel=(kernel, kernel), padding=padding, poison=(1, value))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(bad[others], clean[others])
    assert not bad[1].isfinite().any()


def test_linear_over_tokens():
    check(
        size=(1, 77), kernel=(1, 1), padding=(0, 0, 0, 0), in_channels=(40,), out_channels=130, act_out=Activation.GELU
    )


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no products of bfloat16")
@pytest.mark.parametrize("in_channels", [2, 20, 40, 70, 130, 260])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_products_of_bfloat16(in_channels, vectors, kernel):
    """Inputs and weights are rounded, products and sums are exact to float32."""
    shape = {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4, "in_channels": (in_channels,)}
    for out_channels in (3, 20, 70):
        check(bfloat16=True, out_channels=out_channels, vectors=vectors, **shape)
    check(bfloat16=True, vectors=vectors, tables=True, act_in=Activation.SILU, residual=True, band=2, **shape)
    check(bfloat16=True, vectors=vectors, poison=(1, torch.nan), **shape)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no products of bfloat16")
def test_products_of_bfloat16_of_joined_and_padded_sources():
    check(bfloat16=True, in_channels=(17, 21), up=2, stride=(2, 2))
    check(bfloat16=True, in_channels=(16,), kernel=(1, 1), padding=(0, 1, 0, 1), num_threads=2)
