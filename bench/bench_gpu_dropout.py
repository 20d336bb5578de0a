"""G7: one score step of MC Dropout, K = 5 sets of masks, and the mask itself, against every rival."""

import pytest
import torch

import fastens
from bench.bench_gpu_steps import CALLS, mean
from bench.gpu_contest import (
    DEVICE,
    DTYPE,
    REHEARSAL,
    compiled,
    contest,
    copy_of,
    graphed,
    parallel,
    skip_if_measured,
)
from bench.gpu_networks import flops_per_image, in_float32, network
from fastens.ops.dropout import dropout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
P = 0.1
GOALS = {1: {"compiled loop": 8}, 16: {"compiled loop": 1.5}}


def drawing(model):
    """A network as MC Dropout is usually had: in evaluation mode with its dropout layers in training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    return model


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["ddpmpp", "songunet"])
def test_step(name, batch):
    title = f"dropout_{name}_{batch}"
    skip_if_measured(title)
    batch = min(batch, 2) if REHEARSAL else batch
    model, size = network(name, 0, P)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)
    with torch.no_grad():
        flops = flops_per_image(model, x, t)
        ensemble = fastens.MCDropout(model, K)
        expected = in_float32([ensemble.members[k] for k in range(K)], x, t).mean(0)
        fresh = fastens.MCDropout(model, K, masks="fresh")
        for _ in range(CALLS):
            ensemble(x, t), fresh(x, t)
        random = drawing(model)
        one = compiled(random)

        def eager():
            return random(x, t)

        def step():
            return one(x, t)

        rivals = {
            "eager loop": lambda: lambda: mean([eager() for _ in range(K)]),
            "compiled loop": lambda: lambda: mean([step() for _ in range(K)]),
            "rival 1: parallel graph": lambda: parallel([step] * K, compiled(mean)),
            "rival 5: one graph, K replays": lambda: (lambda run: lambda: mean([run().clone() for _ in range(K)]))(
                graphed(step)
            ),
            "batch repeated K times, compiled graph": lambda: graphed(
                lambda: one(x.repeat(K, 1, 1, 1), t.repeat(K)).unflatten(0, (K, -1)).mean(0)
            ),
        }
        contest(
            title,
            "G7" if name == "ddpmpp" else "",
            f"MC Dropout, {name}: K={K}, B={batch}, {size}x{size}, p={P}, fixed masks, {DTYPE}",
            lambda: ensemble(x, t),
            rivals,
            expected,
            1e-4 if REHEARSAL else 5e-2,
            GOALS.get(batch, {}),
            beside={"ours, fresh masks": lambda: fresh(x, t)},
            unlike=list(rivals),  # their masks are torch's
            extra={"flops": K * batch * flops},
        )


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_mask(backend, layout):
    title = f"mask_{backend}_{layout}"
    skip_if_measured(title)
    batch, channels, size = (2, 8, 4) if REHEARSAL else (16, 256, 32)
    form = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    x = torch.randn(K * batch, channels, size, size, device=DEVICE).to(DTYPE, memory_format=form)
    members = torch.arange(K, device=DEVICE).repeat_interleave(batch)
    samples = torch.arange(batch, device=DEVICE).repeat(K)
    backend = "auto" if REHEARSAL else backend

    def call(backend):
        return dropout(x, members, samples, P, 7, 3, activation="silu", backend=backend)

    inductor = compiled(lambda x: torch.nn.functional.dropout(torch.nn.functional.silu(x), P, True))
    with torch.no_grad():
        contest(
            title,
            "",
            f"SiLU and dropout, R={K * batch}, C={channels}, {size}x{size}, {layout}, {DTYPE}",
            graphed(lambda: call(backend)),
            {
                "torch's integer arithmetic": lambda: graphed(lambda: call("reference")),
                "Inductor, torch's masks": lambda: graphed(lambda: inductor(x)),
            },
            call("reference").float(),
            1e-4 if REHEARSAL else 2e-2,
            {},
            beside={"copy of as many bytes": copy_of(2 * x.numel() * x.element_size())},
            unlike=["Inductor, torch's masks"],
        )
