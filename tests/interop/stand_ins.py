"""What the pages on sampler families name without making it: their networks, files and samplers, small."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.checkpoint_layouts import BOTH
from tests.interop import test_edm, test_guided_diffusion, test_score_sde
from tests.networks import randomised


class TimeFirst(nn.Module):
    """A flow's velocity, called as torchcfm's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) * (1 + t)


class Latent(nn.Module):
    """A CompVis model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Noise()
        self.register_buffer("alphas_cumprod", alphas_cumprod())

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.net(x, t)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x) + t.reshape(-1, 1, 1, 1) / 1000


def write_files(root: Path) -> None:
    """What training with EDM, score_sde, guided-diffusion and denoising-diffusion-pytorch leaves."""
    for folder in ("snapshots", "checkpoints", "results"):
        (root / folder).mkdir()
    for k in range(2):
        snapshot = {"ema": randomised(test_edm.Preconditioned, k)}
        (root / f"snapshots/network-snapshot-{k}.pkl").write_bytes(pickle.dumps(snapshot))
        raw, average = (randomised(test_score_sde.Network, seed) for seed in (k, 9 + k))
        torch.save(BOTH["score_sde"](average, raw), root / f"checkpoints/checkpoint_{k}.pth")
        torch.save(randomised(create_model, k).state_dict(), root / f"ema_0.9999_{k}.pt")


def lucid_files(root: Path) -> None:
    """What its trainer saves; apart, since the library may be missing."""
    from denoising_diffusion_pytorch import Unet

    for k in range(2):
        raw, average = (
            randomised(lambda: Unet(8, dim_mults=(1, 2), channels=1, flash_attn=False), seed) for seed in (k, 9 + k)
        )
        torch.save(BOTH["denoising-diffusion-pytorch"](average, raw), root / f"results/model-{k}.pt")


def models() -> list[nn.Module]:
    """Networks that predict noise from (x, t)."""
    return [randomised(Noise, k) for k in range(2)]


def latent_models() -> list[nn.Module]:
    """CompVis models."""
    return [randomised(Latent, k) for k in range(2)]


def alphas_cumprod() -> Tensor:
    """The schedule that they were trained with."""
    return torch.linspace(0.999, 0.01, 1000)


def edm_sampler() -> Any:
    """EDM's sampler."""
    return test_edm.edm_sampler


def latents() -> Tensor:
    """Noise [B, C, H, W]."""
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def class_labels() -> Tensor:
    """Unit vectors [B, classes]."""
    return torch.eye(3)


def mutils() -> Any:
    """score_sde's module that makes networks, wrapped in DataParallel."""
    return SimpleNamespace(create_model=lambda config: nn.DataParallel(test_score_sde.Network()))


def config() -> Any:
    """Its settings."""
    return SimpleNamespace()


def sampling_fn() -> Any:
    """What its get_sampling_fn made."""
    return test_score_sde.euler_maruyama


def create_model() -> nn.Module:
    """guided-diffusion's network without its weights."""
    return test_guided_diffusion.LearnedSigma()


def diffusion() -> Any:
    """guided-diffusion's GaussianDiffusion."""
    return SimpleNamespace(
        p_sample_loop=lambda model, shape, model_kwargs: test_guided_diffusion.ancestral(model, model_kwargs["y"])
    )


def flow_models() -> list[nn.Module]:
    """Velocities v(t, x)."""
    return [randomised(TimeFirst, k) for k in range(2)]


def x0() -> Tensor:
    """Noise where a flow begins."""
    return torch.randn(2, 1, 8, 8)


VALUES = (
    *(models, latent_models, alphas_cumprod, edm_sampler, latents, class_labels),
    *(mutils, config, sampling_fn, diffusion, flow_models, x0),
)
