"""G1, G2, G3, G7: one score step of K = 5 networks, and of MC Dropout's K passes, against every rival.

Networks of random weights in the shapes of EDM's SongUNet, the paper's DDPM++ and its FFHQ-256 network.
"""

import pytest
import torch

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, compiled, contest, graphed, parallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")]
K = 5
NETWORKS = {  # size, channels, channels per level, blocks per level, resolutions with attention
    "songunet": (32, 3, (256, 256, 256), 4, (16,)),
    "ddpmpp": (32, 3, (128, 256, 256, 256), 4, (16,)),
    "ffhq256": (256, 3, (128, 128, 256, 256, 512, 512), 1, (16,)),
}
GOALS = {
    ("songunet", 1): {"eager loop": 40, "compiled loop": 8, "rival 1: parallel graph": 2.5},
    ("songunet", 16): {"rival 1: parallel graph": 1.8, "rival 3: vmap": 3},
    ("songunet", 256): {"rival 1: parallel graph": 1.35},
}
GOAL_OF_BATCH = {1: "G1", 16: "G2", 256: "G3"}


def network(name, seed, dropout=0.0):
    from diffusers import UNet2DModel

    size, channels, widths, blocks, attention = NETWORKS[name]
    if REHEARSAL:
        size, widths, blocks = size // 4, tuple(w // 8 for w in widths[:2]), 1
    sizes = [size >> level for level in range(len(widths))]
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=blocks,
        block_out_channels=widths,
        norm_num_groups=min(32, widths[0] // 4),
        dropout=dropout,
        down_block_types=tuple("AttnDownBlock2D" if s in attention else "DownBlock2D" for s in sizes),
        up_block_types=tuple("AttnUpBlock2D" if s in attention else "UpBlock2D" for s in reversed(sizes)),
    )
    return model.eval().to(DEVICE, DTYPE, memory_format=torch.channels_last), size


def rivals_of(members, x, t):
    def one(model):
        return lambda: model(x, t, return_dict=False)[0]

    def mean(outputs):
        return torch.stack(outputs).mean(0)

    def loop(runs):
        return lambda: mean([run() for run in runs])

    def grouped_fold():
        ensemble = fastens.Ensemble(members, backend="reference").eval()
        run = compiled(ensemble)
        return graphed(lambda: run(x, t, return_dict=False)[0])

    def vmapped():
        params, buffers = torch.func.stack_module_state(members)

        def call(p, b, x):
            return torch.func.functional_call(members[0], (p, b), (x, t), {"return_dict": False})[0]

        run = compiled(torch.vmap(call, in_dims=(0, 0, None)))
        return graphed(lambda: run(params, buffers, x).mean(0))

    singles = [one(compiled(model)) for model in members]
    return {
        "rival 1: parallel graph": lambda: parallel(singles, compiled(mean)),
        "rival 2: folded, K convolutions, compiled graph": grouped_fold,
        "rival 3: vmap": vmapped,
        "rival 5: K single-member graphs": lambda: loop([graphed(run) for run in singles]),
        "compiled loop": lambda: loop(singles),
        "eager loop": lambda: loop([one(model) for model in members]),
    }


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_step(name, batch):
    if name == "ffhq256" and batch > 16:
        pytest.skip("388 GFLOP per image: K = 5 members of 256 images are half a petaflop a step")
    batch = min(batch, 2) if REHEARSAL else batch
    members, size = zip(*(network(name, seed) for seed in range(K)), strict=True)
    x = torch.randn(batch, 3, size[0], size[0], device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)
    ensemble = fastens.Ensemble(members).eval()
    with torch.no_grad():
        expected = torch.stack([m.float()(x.float(), t).sample for m in members]).mean(0)
        for member in members:
            member.to(DTYPE)
        if not REHEARSAL:
            ensemble.capture(x, t)
        parameters = sum(p.numel() for p in members[0].parameters())
        contest(
            f"step_{name}_{batch}",
            GOAL_OF_BATCH.get(batch, "G1") if name == "songunet" else "",
            f"K={K}, B={batch}, {size[0]}x{size[0]}, {parameters:,} parameters, {DTYPE}",
            lambda: ensemble(x, t).sample,
            rivals_of(members, x, t),
            expected,
            1e-4 if REHEARSAL else 5e-2,
            GOALS.get((name, batch), {}),
        )


@pytest.mark.parametrize("batch", [1, 16])
def test_mc_dropout(batch):
    if not hasattr(fastens, "MCDropout"):
        pytest.skip("G7 waits for fastens.MCDropout")
    pytest.fail("G7: fastens.MCDropout is here, so measure it")
