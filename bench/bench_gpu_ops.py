"""G4, G5, G6: member-batched convolution, group norm with its epilogue, and aggregation, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, compiled, contest, copy_of, graphed, skip_if_measured
from fastens.ops.conv import CHOICE, conv
from fastens.ops.group_norm import group_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
COPY = "copy of as many bytes"
TOLERANCE = 1e-4 if REHEARSAL else 3e-2


def normal(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE)


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("channels", [256, 512])
def test_conv(channels, batch):
    title = f"conv_{channels}_{batch}"
    skip_if_measured(title)
    batch, channels = (1, 16) if REHEARSAL else (batch, channels)
    x = normal(K * batch, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    w = normal(K, channels, channels, 3, 3) / (3 * channels**0.5)
    w = w.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (K, channels))
    settings = ((1, 1), (1, 1))

    def way(name):
        return lambda: graphed(lambda: conv(x, w, None, *settings, way=name))

    with torch.no_grad():
        contest(
            title,
            "G4",
            f"K={K}, B={batch}, {channels} channels, 16x16, 3x3, {DTYPE}",
            graphed(lambda: conv(x, w, None, *settings)),
            {"K cuDNN calls": way("members"), "rival 4: groups=K": way("grouped")},
            torch.cat([F.conv2d(rows.float(), w[k].float(), padding=1) for k, rows in enumerate(x.chunk(K))]),
            TOLERANCE,
            {"K cuDNN calls": 1.05 if batch == 256 else 3 if batch == 1 else 1, "rival 4: groups=K": 2},
            extra={
                "flops": 18 * K * batch * channels**2 * 256,
                "way": CHOICE.choose((x, w, None, *settings, (1, 1), False, (0, 0), 1), x.device),
            },
        )


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(("channels", "size", "batch"), [(256, 32, 16), (256, 8, 16), (128, 128, 8), (256, 32, 1)])
def test_group_norm(channels, size, batch, layout):
    title = f"group_norm_{layout}_{channels}_{size}_{batch}"
    skip_if_measured(title)
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
            title,
            "G5",
            f"R={K * batch}, C={channels}, {size}x{size}, {layout}, {DTYPE}",
            graphed(lambda: call(x, w, b, scale, shift, "auto")),
            {
                "aten chain": lambda: graphed(aten),
                "Inductor": lambda: graphed(lambda: inductor(x, w, b, scale, shift)),
            },
            call(*(t.float() for t in (x, w, b, scale, shift)), "reference"),
            TOLERANCE,
            {"aten chain": 8, "Inductor": 2, COPY: 0.85},
            beside={COPY: copy_of(moved)},
            extra={"bytes": moved},
        )


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("rule", ["mean", "sum", "median", "geometric", "dominant", "max_abs"])
def test_aggregate(rule, backend):
    title = f"aggregate_{rule}_{backend}"
    skip_if_measured(title)
    shape = (2, 3, 8, 8) if REHEARSAL else (256, 3, 256, 256)
    scores = [normal(*shape) for _ in range(K)]
    backend = "auto" if REHEARSAL else backend
    moved = (K + 1) * scores[0].numel() * scores[0].element_size()

    def by_reference(scores):
        return fastens.aggregate(scores, rule, backend="reference")

    inductor = compiled(by_reference)
    with torch.no_grad():
        contest(
            title,
            "G6",
            f"K={K}, {list(shape)}, list of members, {DTYPE}",
            graphed(lambda: fastens.aggregate(scores, rule, backend=backend)),
            {
                "aten": lambda: graphed(lambda: by_reference(scores)),
                "Inductor": lambda: graphed(lambda: inductor(scores)),
            },
            by_reference([x.float() for x in scores]),
            TOLERANCE,
            {COPY: 0.45 if rule == "geometric" else 0.9, "our mean": 0.5 if rule == "geometric" else 0.9},
            beside={
                COPY: copy_of(moved),
                "our mean": graphed(lambda: fastens.aggregate(scores, "mean", backend=backend)),
            },
            extra={"bytes": moved},
        )
