"""G4 and what surrounds a convolution: every way of it, a residual block, a first and a last layer, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, compiled, contest, graphed, skip_if_measured
from fastens.ops import _block_ways, conv
from fastens.ops.conv2d import conv2d
from fastens.ops.conv2d_sum import conv2d_sum
from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.program.block import ConvBlock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
TOLERANCE = 1e-4 if REHEARSAL else 3e-2
BATCHES = [1, 2] if REHEARSAL else [1, 16, 256]  # of a rehearsal once, since its images and channels are as few for all
CHANNELS = [256] if REHEARSAL else [256, 512]
BLOCKS = [(256, 32)] if REHEARSAL else [(256, 32), (256, 16), (256, 8), (512, 8)]


def normal(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def images(rows, channels, size):
    return normal(rows, channels, size, size).contiguous(memory_format=torch.channels_last)


def kernels(outputs, channels, taps):
    """Weights [K, O, C, h, w], channels last, as the stack of members in channels_last has them."""
    drawn = normal(K, outputs, taps, taps, channels) / (taps * channels**0.5)
    return drawn.movedim(-1, 2)


def one_by_one(x, weight, padding):
    return torch.cat([F.conv2d(rows, weight[k], padding=padding) for k, rows in enumerate(x.chunk(K))])


def sizes(batch, channels, size):
    return (batch, 8, 4) if REHEARSAL else (batch, channels, size)


@pytest.mark.parametrize(("taps", "size"), [(3, 32), (3, 8), (1, 16)])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_ways(batch, channels, taps, size):
    name = f"conv_ways_{taps}x{taps}_{channels}_{size}_{batch}"
    skip_if_measured(name)
    batch, channels, size = sizes(batch, channels, size)
    x, weight = images(K * batch, channels, size), kernels(channels, channels, taps)
    call = (x, weight, None, (1, 1), (taps // 2,) * 2, (1, 1), False, (0, 0), 1, None)

    def way(name):
        return lambda: graphed(lambda: conv.conv(*call, way=name))

    others = [w for w in conv.CHOICE.ways if conv.CHOICE.ways[w].refuses(*call) is None]
    with torch.no_grad():
        contest(
            name,
            "G4" if taps == 3 else "",
            f"K={K}, B={batch}, {channels} channels, {size}x{size}, {taps}x{taps}, {DTYPE}",
            graphed(lambda: conv.conv(*call)),
            {"K cuDNN calls" if w == "members" else f"way {w}": way(w) for w in others},
            one_by_one(x.float(), weight.float(), taps // 2),
            TOLERANCE,
            {"K cuDNN calls": 1.05 if batch == 256 else 3 if batch == 1 else 1, "way grouped": 2} if taps == 3 else {},
        )


@pytest.mark.parametrize(("channels", "size"), BLOCKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_residual_block(batch, channels, size):
    name = f"block_{channels}_{size}_{batch}"
    skip_if_measured(name)
    batch, channels, size = sizes(batch, channels, size)
    groups = min(32, channels // 4)
    x, time = images(K * batch, channels, size), normal(K * batch, channels)
    first, second = (kernels(channels, channels, 3) for _ in "12")
    maps = [normal(K, channels) for _ in range(4)]

    def blocks(x):
        """The two convolutions: of the first, and of its result and moments."""
        around = {"padding": (1, 1), "activation": "silu", "num_groups": groups}
        begins = ConvBlock.of(
            x, first, moments=before, norm_weight=maps[0], norm_bias=maps[1], row_bias=time, **around
        )  # fmt: skip
        return begins, lambda inner, moments: ConvBlock.of(
            inner, second, moments=moments, norm_weight=maps[2], norm_bias=maps[3], residual=x,
            output_scale=0.5**0.5, **around,
        )  # fmt: skip

    def fused(backend="auto"):
        begins, ends = blocks(x)
        return conv2d(ends(*conv2d(begins, backend=backend)), backend=backend)

    def way(name, x=x):
        run, moments = _block_ways.CHOICE.ways[name].run, before.new_empty(before.shape)
        (begins, ends), size = blocks(x), tuple(x.shape[2:])
        inner = run(begins, size, None, moments)
        return run(ends(inner, moments), size, None, torch.empty_like(moments))

    def taken(name):
        return _block_ways.CHOICE.ways[name].refuses(blocks(x)[0], tuple(x.shape[2:])) is None

    def chain(x, time, convolve, backend="auto"):
        y = group_norm(x, groups, *maps[:2], activation="silu", backend=backend)
        y = convolve(y, first) + time[:, :, None, None]
        y = convolve(group_norm(y, groups, *maps[2:], activation="silu", backend=backend), second)
        return (y + x) * 0.5**0.5

    def cudnn(y, weight):
        return one_by_one(y, weight, 1)

    def chosen(y, weight):
        return conv.conv(y, weight, None, (1, 1), (1, 1))

    inductor = compiled(lambda x, time: chain(x, time, cudnn, "reference"))
    with torch.no_grad():
        before = group_moments(x, groups)
        contest(
            name,
            "",
            f"K={K}, B={batch}, {channels} channels, {size}x{size}, norm, 3x3, time, norm, 3x3, residual, {DTYPE}",
            graphed(lambda: fused()[0]),
            {
                "norm kernels and K cuDNN calls": lambda: graphed(lambda: chain(x, time, cudnn)),
                "norm kernels and the measured way": lambda: graphed(lambda: chain(x, time, chosen)),
                "Inductor": lambda: graphed(lambda: inductor(x, time)),
                **{
                    f"way {name}": lambda name=name: graphed(lambda: way(name))
                    for name in filter(taken, _block_ways.CHOICE.ways)
                },
            },
            in_float(x, time, first, second, maps, groups),
            TOLERANCE,
            {},
        )


def in_float(x, time, first, second, maps, groups):
    """The block in float32, by the library."""
    x, time, first, second = (t.float() for t in (x, time, first, second))
    maps = [t.float() for t in maps]
    y = group_norm(x, groups, *maps[:2], activation="silu", backend="reference")
    y = one_by_one(y, first, 1) + time[:, :, None, None]
    y = one_by_one(group_norm(y, groups, *maps[2:], activation="silu", backend="reference"), second, 1)
    return (y + x) * 0.5**0.5


@pytest.mark.parametrize("batch", BATCHES)
def test_last_layer_under_the_mean(batch):
    name = f"last_layer_{batch}"
    skip_if_measured(name)
    batch, channels, size = sizes(batch, 256, 32)
    x, weight = images(K * batch, channels, size), kernels(3, channels, 3)
    with torch.no_grad():
        contest(
            name,
            "",
            f"K={K}, B={batch}, {channels} to 3 channels, {size}x{size}, 3x3, mean, {DTYPE}",
            graphed(lambda: conv2d_sum(ConvBlock(x, weight, padding=(1, 1)), [1 / K] * K)),
            {"K cuDNN calls, mean": lambda: graphed(lambda: one_by_one(x, weight, 1).unflatten(0, (K, -1)).mean(0))},
            one_by_one(x.float(), weight.float(), 1).unflatten(0, (K, -1)).mean(0),
            TOLERANCE,
            {},
        )


@pytest.mark.parametrize("batch", BATCHES)
def test_first_layer_of_shared_input(batch):
    name = f"first_layer_{batch}"
    skip_if_measured(name)
    batch, channels, size = sizes(batch, 256, 32)
    x, weight = images(batch, 3, size), kernels(channels, 3, 3)
    with torch.no_grad():
        contest(
            name,
            "",
            f"K={K}, B={batch}, 3 to {channels} channels, {size}x{size}, 3x3, one input, {DTYPE}",
            graphed(lambda: conv2d(ConvBlock(x, weight, padding=(1, 1), shared=True))[0]),
            {
                "one convolution of K O outputs": lambda: graphed(
                    lambda: F.conv2d(x, weight.flatten(0, 1), padding=1).unflatten(1, (K, -1)).transpose(0, 1)
                    .flatten(0, 1)
                ),
                "K cuDNN calls": lambda: graphed(lambda: one_by_one(x.repeat(K, 1, 1, 1), weight, 1)),
            },
            one_by_one(x.float().repeat(K, 1, 1, 1), weight.float(), 1),
            TOLERANCE,
            {},
        )  # fmt: skip
