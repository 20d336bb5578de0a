"""The first minute on a GPU: every way of a few convolutions, split sums and a replayed step, held against the library.

``python -m bench.gpu_smoke`` prints a line per check, goes on behind one that fails, and then exits with status 1.
"""

import sys

import torch

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, environment
from bench.gpu_launches import Convolution, K
from bench.gpu_networks import in_float32, network
from fastens.kernels._conv2d_launch import tiles_for
from fastens.ops._block_ways import CHOICE
from fastens.ops._tma_ways import Call
from fastens.ops.group_moments import group_moments
from fastens.program.block import ConvBlock

WIDTH, SIDE = (16, 8) if REHEARSAL else (256, 32)
AROUND = {"padding": 1, "bias": True, "affine": True, "activation": "silu", "groups": 4 if REHEARSAL else 32}
NORMED = {**AROUND, "moments": AROUND["groups"]}
CONVOLUTIONS = {  # name -> the convolution, and images a member
    "residual": (Convolution(WIDTH, WIDTH, 3, SIDE, SIDE, residual=True, output_scale=0.7, **NORMED), 2),
    "row bias": (Convolution(WIDTH, WIDTH, 3, SIDE, SIDE, row_bias=True, **NORMED), 1),
    "split sums": (Convolution(WIDTH, WIDTH, 3, SIDE // 4, SIDE // 4, row_bias=True, **NORMED), 1),
    "several images a tile": (Convolution(WIDTH, WIDTH, 3, SIDE // 4, SIDE // 4, residual=True, **NORMED), 3),
    "two images as one": (
        Convolution(WIDTH, WIDTH, 3, SIDE // 2, SIDE // 2, WIDTH, skip_moments=NORMED["moments"],
                    norm_groups=NORMED["moments"], row_bias=True, **NORMED), 1,
    ),
    "1x1": (Convolution(WIDTH, 3 * WIDTH, 1, SIDE // 2, SIDE // 2, bias=True), 2),
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def filled(conv, batch):
    """A convolution's block with normal numbers, and moments that are those of its images."""

    def fill(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).normal_()

    block, size, *_ = conv.call(batch, DTYPE)
    block = ConvBlock.from_flat([fill(x) for x in block.flat()])
    block = block.replace(
        weight=block.weight / (conv.taps * block.weight.shape[2] ** 0.5),
        moments=moments_of(block.x, conv.moments), skip_moments=moments_of(block.prologue.skip, conv.skip_moments),
    )  # fmt: skip
    return Call(block, size)


def moments_of(image, groups):
    return group_moments(image.float(), groups, backend="reference") if groups else None


def error(actual, expected):
    """The largest difference beside the largest number; not a number where either is none."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def ways():
    """Each way of each convolution against the library's in double precision: yields name, error, tolerance."""
    for name, (conv, batch) in CONVOLUTIONS.items():
        call = filled(conv, batch)
        block, size, *_ = call
        double = ConvBlock.from_flat([x.double() if isinstance(x, torch.Tensor) else x for x in block.flat()])
        expected = CHOICE.ways["library"].run(double, size)
        for way in CHOICE.ways:
            if CHOICE.ways[way].refuses(*call) is None:
                yield f"{name}: {way}", error(CHOICE.ways[way].run(*call), expected), TOLERANCE[DTYPE]
        if name == "split sums" and not REHEARSAL:
            sources = (block.x.shape[1], 0)
            tiles = tiles_for(block.x, K, batch, size[0] * size[1], conv.outputs, sources, 9, 8)
            yield f"{name}: {tiles.splits} splits, expected several", float(tiles.splits == 1), 0.5


def step():
    """A step of five members at one image, as the plan's replay gives it, against float32."""
    members, size = zip(*(network("songunet", seed) for seed in range(K)), strict=True)
    x = torch.randn(1, 3, size[0], size[0], device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((1,), 500, device=DEVICE)
    expected = in_float32(members, x, t).mean(0)
    ensemble = fastens.Ensemble(members).eval()
    for call in range(8):
        y = ensemble(x, t)
        yield f"step, call {call}", error(y, expected), 1e-4 if REHEARSAL else 5e-2
    replayed = ensemble(x, t)
    yield "step, twice the same", float(not torch.equal(replayed, y)), 0.5
    print(ensemble.report().plans)


@torch.no_grad()
def main():
    if not DEVICE:
        raise SystemExit("gpu_smoke needs a CUDA device, or FASTENS_BENCH_DEVICE=cpu to rehearse")
    torch.manual_seed(0)
    print(environment())
    failed = 0
    for part in (ways, step):
        try:
            for name, found, tolerance in part():
                right = found <= tolerance  # false of what is no number
                failed += not right
                print(f"{'ok    ' if right else 'WRONG '} {name}: {found:.1e}", flush=True)
        except Exception as problem:  # the other part says something all the same
            failed += 1
            print(f"FAILED {part.__name__}: {type(problem).__name__}: {problem}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
