"""What the documents' snippets name without making it: a small one of each, by the name that the snippets use."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastens
from tests.interop import stand_ins as families
from tests.networks import randomised, small_unet

FOLDERS = ["run1/unet", "run2/unet", "run3/unet"]


def write_files(root: Path) -> None:
    """Files that snippets read: diffusers folders, pipelines, and a training script's checkpoints."""
    from diffusers import DDIMPipeline

    families.write_files(root)
    for k, folder in enumerate(FOLDERS):
        network = randomised(make_unet, k)
        network.save_pretrained(root / folder)
        DDIMPipeline(unet=network, scheduler=scheduler()).save_pretrained(root / f"pipe{k + 1}")
        states = {f"model.diffusion_model.{name}": tensor for name, tensor in network.state_dict().items()}
        (root / f"runs/{k}").mkdir(parents=True)
        average = {name: 0.5 * tensor for name, tensor in states.items()}
        torch.save({"state_dict": states, "ema_0.9999": average}, root / f"runs/{k}/last.ckpt")


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000)


def make_unet() -> nn.Module:
    """Your network without its weights."""
    return small_unet()


def make_model(seed: int) -> nn.Module:
    """A network to be trained."""
    return randomised(make_unet, seed).train()


def make_wider_model(seed: int) -> nn.Module:
    """A network of another width."""
    return randomised(lambda: small_unet(block_out_channels=(8,)), seed)


@functools.cache
def ens() -> fastens.Ensemble:
    """An ensemble; of one snippet, which may have it in a pipeline too."""
    return fastens.Ensemble([randomised(make_unet, k) for k in range(3)])


def pipe() -> Any:
    """A pipeline whose model is an ensemble."""
    from diffusers import DDIMPipeline

    return DDIMPipeline(unet=ens(), scheduler=scheduler())


def paths() -> list[str]:
    """Checkpoints of members."""
    return FOLDERS


def rf() -> Any:
    """A fitted RandomForestRegressor."""
    from sklearn.ensemble import RandomForestRegressor

    rows = X()
    return RandomForestRegressor(5, max_depth=3, random_state=0).fit(rows, rows[:, :2])


def X() -> np.ndarray:
    """Rows of a table."""
    return np.random.default_rng(0).normal(size=(20, 3))


def x() -> torch.Tensor:
    """The rows as a tensor."""
    return torch.from_numpy(X()).float()


def model() -> Any:
    """A fitted ForestDiffusionModel."""
    from ForestDiffusion.diffusion_with_trees_class import ForestDiffusionModel

    return ForestDiffusionModel(X(), model="random_forest", n_t=3, n_estimators=2, duplicate_K=2, n_jobs=1)


def schedule() -> fastens.schedules.Schedule:
    """The schedule that the members were trained with."""
    return fastens.schedules.from_scheduler(scheduler())


def training_images() -> torch.Tensor:
    """Images [N, C, H, W]."""
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def images_t() -> torch.Tensor:
    """Noisy images [B, C, H, W]."""
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def batches() -> list[tuple[torch.Tensor, ...]]:
    """Noisy images, times and noise, each [K, B, ...]."""
    generator = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, 5, 2, 1, 8, 8, generator=generator)
    return [(noisy, torch.randint(1000, (5, 2), generator=generator), noise)]


def conditional() -> fastens.Ensemble:
    """Members that take a class, or 10 for none."""
    members = [randomised(lambda: small_unet(num_class_embeds=11), k) for k in range(2)]
    return fastens.Ensemble(members, schedule=schedule())


def weak() -> nn.Module:
    """A narrower network that takes a class."""
    return randomised(lambda: small_unet(num_class_embeds=11, block_out_channels=(8,)), 9)


def noisy() -> torch.Tensor:
    """Noisy images [B, C, H, W]."""
    return training_images()


def labels() -> torch.Tensor:
    """Their classes."""
    return torch.arange(4)


def checkpoint() -> nn.Module:
    """One trained network."""
    return randomised(make_unet, 0)


class Forecaster(nn.Module):
    """Predicts the noise of a change from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, change: torch.Tensor, t: int, state: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([change, state], 1)) + t / 1000


def weather_models() -> list[nn.Module]:
    """Networks that predict the noise of a change from (change, t, state)."""
    return [randomised(Forecaster, k) for k in range(3)]


def analysis() -> torch.Tensor:
    """The present state [1, C, H, W]."""
    return images_t()[:1]


def runs() -> torch.Tensor:
    """Forecasts [K, N, leads, C, H, W]."""
    return torch.randn(3, 10, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def observed() -> torch.Tensor:
    """What came [leads, C, H, W]."""
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def segmenter() -> nn.Module:
    """A segmentation network with dropout."""
    return randomised(lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Dropout2d(0.5), nn.Conv2d(8, 1, 1)), 0)


def scans() -> torch.Tensor:
    """Images to segment [B, C, H, W]."""
    return images_t()


def truth() -> torch.Tensor:
    """Their segmentation."""
    return (images_t() > 0).float()


def segmentation() -> torch.Tensor:
    """The mean of the members' probabilities."""
    return images_t().sigmoid()


def doubt() -> torch.Tensor:
    """Their deviation."""
    return images_t().abs()


_VALUES = (
    *(ens, pipe, paths, rf, X, x, model, schedule, scheduler, training_images, images_t, batches),
    *(conditional, weak, noisy, labels, checkpoint, weather_models, analysis, runs, observed),
    *(segmenter, scans, truth, segmentation, doubt, *families.VALUES),
)
STAND_INS = {made.__name__: made for made in _VALUES}
FUNCTIONS = {made.__name__: made for made in (make_unet, make_model, make_wider_model, families.create_model)}


def imported() -> dict[str, Any]:
    """What the first snippet of the documents imports for all."""
    from diffusers import DDIMPipeline, DDIMScheduler

    return {"fastens": fastens, "torch": torch, "DDIMPipeline": DDIMPipeline, "DDIMScheduler": DDIMScheduler}
