"""One step of a program: a member-batched 3x3 convolution directly, in Winograd's squares, and K of torch's."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Contender, contest
from fastens.ops.run_program import available, run_program
from fastens.plan.cpu.packing import pack, packed_size
from fastens.plan.cpu.tiling import Shape, tile
from fastens.plan.cpu.winograd import squares_of
from fastens.program import steps
from fastens.program.steps import NONE, Activation, Image, Slot, address

pytestmark = pytest.mark.skipif(not available(), reason="no compiled library")
K = 5
TOLERANCE = 1e-5


def shape_of(x: Tensor, weight: Tensor) -> Shape:
    """The convolution of images x [K*B, H, W, C] by weights [K, O, C, 3, 3]."""
    rows, height, width, channels = x.shape
    return Shape(rows, height, width, channels, weight.shape[1], (3, 3), (1, 1), K, rows // K)


def step(x: Tensor, weight: Tensor, squares: int) -> Contender:
    """SiLU, then the convolution, as a program of one step that writes [K*B, H, W, O]."""
    rows, height, width, channels = x.shape
    out_channels, threads = weight.shape[1], torch.get_num_threads()
    tiling = tile(shape_of(x, weight), threads, squares)
    packed = torch.empty(packed_size(weight.shape, squares=squares))
    pack(weight, tiling.vectors, False, packed, squares)

    def image(slot: int, depth: int) -> Image:
        return Image(address(slot, 0), height * width * depth, width * depth, depth, depth, rows)

    kind = functools.partial(steps.Winograd, tile=squares) if squares else steps.Conv
    made = kind(
        rows,
        rows // K,
        tiling.row_chunk,
        tiling.band,
        tiling.block_chunk,
        tiling.vectors,
        (image(Slot.ARGUMENTS, channels), Image()),
        1,
        *(height, width, 3, 3, 1, 1, 1, 1, height, width),
        out_channels,
        NONE,
        NONE,
        int(Activation.SILU),
        address(Slot.WEIGHTS, 0),
        packed.numel() // K,
        NONE,
        0,
        NONE,
        0,
        Image(),
        1.0,
        int(Activation.NONE),
        image(Slot.ARGUMENTS + 1, out_channels),
        tasks=tiling.tasks,
    )
    program, arena = steps.encode([made]), torch.empty(16)
    out = torch.empty(rows, height, width, out_channels)

    def run() -> Tensor:
        run_program(program, packed, arena, [x], [out], threads)
        return out

    return run


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("channels", "size"), [(64, 16), (128, 16), (256, 32), (256, 16), (256, 8)])
def test_convolution_step(benchmark, channels, size, batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(K * batch, size, size, channels, generator=generator)
    weight = torch.randn(K, channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    kernels = [w.contiguous(memory_format=torch.channels_last) for w in weight]
    images = x.permute(0, 3, 1, 2).chunk(K)

    def torchs(dtype: torch.dtype = torch.float32) -> Tensor:
        of_members = zip(images, kernels, strict=True)
        ys = [F.conv2d(F.silu(rows.to(dtype)), w.to(dtype), padding=1) for rows, w in of_members]
        return torch.cat(ys).permute(0, 2, 3, 1)

    chosen = squares_of(shape_of(x, weight), torch.get_num_threads())
    names = {0: "directly", 2: "in squares of 2x2", 4: "in squares of 4x4"}
    ours = step(x, weight, chosen)
    with torch.no_grad():
        contest(
            benchmark,
            ours,
            {**{name: step(x, weight, s) for s, name in names.items() if s != chosen}, "K of torch's": torchs},
            torchs(torch.float64),
            TOLERANCE,
            "",
            f"convolution step, {channels} channels, {size}x{size}, batch {batch}: chosen {names[chosen]}",
            f"K={K}, B={batch}, {channels} channels, {size}x{size}, float32",
            rounds=10 if batch * size * size * channels < 2**20 else 3,
        )
