"""Every network that the tests fold, and some of diffusers' kinds in larger sizes: ours against the eager loop.

A pass that is slower than the loop is a bug. ``fastens bench --only bench_networks`` prints the table; each row holds
the largest relative error beside the ratio.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastens
from bench.bench_forward import small_members
from bench.contest import contest
from tests.networks import NETWORKS, GRUDenoiser, randomised, rows, tensor_of

K = 5
TOLERANCE = 1e-5  # that of tests/tolerances.py for networks in float32
BATCHES = (1, 4, 16)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


class _Upsampling(nn.Module):
    """Transposed convolutions between plain ones, as denoising-diffusion-pytorch had them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


MORE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "unet_2d, 0.7 million": (lambda: small_members(1)[0], lambda b: ((rows(b, 3, 16, 16), torch.arange(b)), {})),
    "dit, 128 channels": (
        _dit,
        lambda b: ((rows(b, 3, 16, 16),), {"timestep": torch.arange(b), "class_labels": torch.arange(b) % 5}),
    ),
    "upsampling": (_Upsampling, lambda b: ((rows(b, 3, 16, 16),), {})),
    "gru, 64 steps": (lambda: GRUDenoiser(True), lambda b: ((rows(b, 64, 3), rows(b)), {})),
}
EVERY = {**NETWORKS, **MORE}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", EVERY)
def test_network(benchmark, name, batch):
    make, arguments = EVERY[name]
    members = [randomised(make, seed) for seed in range(K)]
    args, kwargs = arguments(batch)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        doubles = [tensor_of(member(*args, **kwargs)).double() for member in members]
        contest(
            benchmark,
            lambda: tensor_of(ensemble(*args, **kwargs)),
            {"eager loop": lambda: torch.stack([tensor_of(m(*args, **kwargs)) for m in members]).mean(0)},
            torch.stack(doubles).mean(0),
            TOLERANCE,
            "networks",
            f"{name}, batch {batch}",
            f"K={K}, B={batch}, {sum(p.numel() for p in members[0].parameters()):,} parameters, float32",
            {"eager loop": 1.0},
            rounds=15,
        )
        benchmark.extra_info["relative_error"] = ensemble.verify(*args, **kwargs)
        benchmark.extra_info["engine"] = ensemble.engine
