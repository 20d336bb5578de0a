"""G4, G5, G6: member-batched convolution, group norm with its epilogue, and aggregation, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, compiled, contest, copy_seconds, graphed
from fastens.ops.conv import conv
from fastens.ops.group_norm import group_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
TOLERANCE = 1e-4 if REHEARSAL else 3e-2


def normal(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE)


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("channels", [256, 512])
def test_conv(channels, batch):
    batch, channels = (1, 16) if REHEARSAL else (batch, channels)
    x = normal(K * batch, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    w = normal(K, channels, channels, 3, 3) / (3 * channels**0.5)
    grouped = x.unflatten(0, (K, batch)).transpose(0, 1).reshape(batch, K * channels, 16, 16)

    def by_groups():
        y = F.conv2d(grouped, w.flatten(0, 1), padding=1, groups=K)
        return y.unflatten(1, (K, channels)).transpose(0, 1).flatten(0, 1)

    def one_by_one():
        return torch.cat([F.conv2d(rows, w[k], padding=1) for k, rows in enumerate(x.chunk(K))])

    with torch.no_grad():
        contest(
            f"conv_{channels}_{batch}",
            "G4",
            f"K={K}, B={batch}, {channels} channels, 16x16, 3x3, {DTYPE}",
            graphed(lambda: conv(x, w, None, (1, 1), (1, 1))),
            {"K cuDNN calls": lambda: graphed(one_by_one), "rival 4: groups=K": lambda: graphed(by_groups)},
            torch.cat([F.conv2d(rows.float(), w[k].float(), padding=1) for k, rows in enumerate(x.chunk(K))]),
            TOLERANCE,
            {"K cuDNN calls": 1.05 if batch == 256 else 3 if batch == 1 else 1, "rival 4: groups=K": 2},
        )


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(("channels", "size", "batch"), [(256, 32, 16), (256, 8, 16), (128, 128, 8), (256, 32, 1)])
def test_group_norm(channels, size, batch, layout):
    channels, size, batch = (32, 8, 2) if REHEARSAL else (channels, size, batch)
    form = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    x = normal(K * batch, channels, size, size).contiguous(memory_format=form)
    w, b, scale, shift = (
        normal(K, channels),
        normal(K, channels),
        normal(K * batch, channels),
        normal(K * batch, channels),
    )

    def call(x, w, b, scale, shift, backend):
        return group_norm(x, 8 if REHEARSAL else 32, w, b, 1e-5, None, scale, shift, "silu", backend=backend)

    def aten():
        return call(x, w, b, scale, shift, "reference")

    inductor = compiled(lambda *tensors: call(*tensors, "reference"))
    moved = 2 * x.numel() * x.element_size()
    with torch.no_grad():
        contest(
            f"group_norm_{layout}_{channels}_{size}_{batch}",
            "G5",
            f"R={K * batch}, C={channels}, {size}x{size}, {layout}, {DTYPE}",
            graphed(lambda: call(x, w, b, scale, shift, "auto")),
            {
                "aten chain": lambda: graphed(aten),
                "Inductor": lambda: graphed(lambda: inductor(x, w, b, scale, shift)),
            },
            call(*(t.float() for t in (x, w, b, scale, shift)), "reference"),
            TOLERANCE,
            {"aten chain": 8, "Inductor": 2},
            {"bytes": moved, "copy seconds": copy_seconds(moved), "wanted of copy": 0.85},
        )


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("rule", ["mean", "sum", "median", "geometric", "dominant", "max_abs"])
def test_aggregate(rule, backend):
    shape = (2, 3, 8, 8) if REHEARSAL else (256, 3, 256, 256)
    scores = [normal(*shape) for _ in range(K)]
    backend = "auto" if REHEARSAL else backend
    moved = (K + 1) * scores[0].numel() * scores[0].element_size()

    def by_reference(scores):
        return fastens.aggregate(scores, rule, backend="reference")

    inductor = compiled(by_reference)
    with torch.no_grad():
        contest(
            f"aggregate_{rule}_{backend}",
            "G6",
            f"K={K}, {list(shape)}, list of members, {DTYPE}",
            graphed(lambda: fastens.aggregate(scores, rule, backend=backend)),
            {"aten": lambda: lambda: by_reference(scores), "Inductor": lambda: lambda: inductor(scores)},
            by_reference([x.float() for x in scores]),
            TOLERANCE,
            {},
            {
                "bytes": moved,
                "copy seconds": copy_seconds(moved),
                "wanted of copy": 0.45 if rule == "geometric" else 0.9,
            },
        )
