"""C2, C3, C4: one folded forward of K = 5 U-Nets against loops over the members and vmap."""

import pytest
import torch

import fastens
from bench.contest import contest
from fastens.demo import member_paths
from fastens.demo.train import MODEL

K = 5


def digits_members():
    return list(fastens.Ensemble(member_paths()).members)


def small_members():
    from diffusers import UNet2DModel

    members = []
    for seed in range(K):
        torch.manual_seed(seed)
        members.append(
            UNet2DModel(
                sample_size=16,
                in_channels=3,
                out_channels=3,
                layers_per_block=1,
                block_out_channels=(32, 64),
                norm_num_groups=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ).eval()
        )
    return members


def rivals_of(members, x, t):
    compiled = [torch.compile(member) for member in members]
    params, buffers = torch.func.stack_module_state(members)

    def one(p, b, x):
        return torch.func.functional_call(members[0], (p, b), (x, t)).sample

    vmapped = torch.vmap(one, in_dims=(0, 0, None))

    def loop(models):
        return torch.stack([model(x, t).sample for model in models]).mean(0)

    rivals = {
        "eager loop": lambda: loop(members),
        "compiled loop": lambda: loop(compiled),
        "vmap": lambda: vmapped(params, buffers, x).mean(0),
    }
    try:
        rivals["vmap"]()
    except RuntimeError:
        del rivals["vmap"]
    return rivals


WANTED = {
    ("C2", 1): {"eager loop": 10, "compiled loop": 5},
    ("C3", 1): {"eager loop": 4, "compiled loop": 1.2},
    ("C3", 4): {"eager loop": 2.5, "compiled loop": 1.2},
    ("C3", 16): {"eager loop": 1.6, "compiled loop": 1.2},
    ("C3", 64): {"eager loop": 1.6, "compiled loop": 1.2},
}


def song_sized_members():
    """As many channels and blocks as EDM's SongUNet at 32x32, about 56 million parameters, in diffusers' blocks."""
    from diffusers import UNet2DModel

    members = []
    for seed in range(K):
        torch.manual_seed(seed)
        members.append(
            UNet2DModel(
                sample_size=32,
                layers_per_block=4,
                block_out_channels=(256, 256, 256),
                down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=256,
            ).eval()
        )
    return members


@pytest.mark.parametrize("batch", [1, 4])
def test_song_sized(benchmark, batch):
    members = song_sized_members()
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        contest(
            benchmark,
            lambda: ensemble(x, t).sample,
            {"eager loop": lambda: torch.stack([member(x, t).sample for member in members]).mean(0)},
            torch.stack([member(x, t).sample.double() for member in members]).mean(0),
            1e-4,
            "C4",
            f"C4 forward, batch {batch}",
            f"K={K}, B={batch}, 32x32, {sum(p.numel() for p in members[0].parameters()):,} parameters, float32",
            {"eager loop": 1.35},
            rounds=5,
        )


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_bfloat16(benchmark, batch):
    members = [member.to(torch.bfloat16) for member in small_members()]
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    t = torch.full((batch,), 500)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        contest(
            benchmark,
            lambda: ensemble(x, t).sample,
            {"eager loop": lambda: torch.stack([member(x, t).sample for member in members]).mean(0)},
            torch.stack([member.float()(x.float(), t).sample for member in small_members()]).mean(0),
            5e-2,
            "C3",
            f"C3 forward in bfloat16, batch {batch}",
            f"K={K}, B={batch}, 16x16, bfloat16",
            None,
            rounds=10,
        )


@pytest.mark.parametrize("goal", ["C2", "C3"])
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_forward(benchmark, goal, batch):
    members = digits_members() if goal == "C2" else small_members()
    size, channels = (MODEL["sample_size"], 1) if goal == "C2" else (16, 3)
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        contest(
            benchmark,
            lambda: ensemble(x, t).sample,
            rivals_of(members, x, t),
            torch.stack([member(x, t).sample.double() for member in members]).mean(0),
            1e-4,
            goal,
            f"{goal} forward, batch {batch}",
            f"K={K}, B={batch}, {size}x{size}, {sum(p.numel() for p in members[0].parameters()):,} parameters, float32",
            WANTED.get((goal, batch)),
            rounds=20,
        )
