"""diffusers' own pipelines, unmodified, with an ensemble as their model."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    ModelMixin,
    UNet2DModel,
)
from torch import nn

import fastens
from tests.networks import dit, randomised, unet_2d


class Looped(nn.Module):
    """The paper's way: run every member, stack, average."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config, self.dtype, self.device = members[0].config, members[0].dtype, members[0].device

    def forward(self, *args, **kwargs):
        outputs = [member(*args, **kwargs) for member in self.members]
        return type(outputs[0])(sample=torch.stack([output.sample for output in outputs]).mean(0))


@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_unet_pipelines(pipeline, scheduler):
    members = [randomised(lambda: unet_2d(True), seed) for seed in range(3)]
    images = []
    for model in (fastens.Ensemble(members), Looped(members)):
        pipe = pipeline(unet=model, scheduler=scheduler())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(2, generator, num_inference_steps=4, output_type="np").images)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_dit_pipeline():
    members = [randomised(dit, seed) for seed in range(2)]
    torch.manual_seed(0)
    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (8,), latent_channels=3, norm_num_groups=4, sample_size=8
    ).eval()
    pipe = DiTPipeline(fastens.Ensemble(members), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape[0] == 2
    assert images.std() > 0


def test_is_a_diffusers_model():
    ensemble = fastens.Ensemble([randomised(lambda: unet_2d(False), seed) for seed in range(2)])
    assert isinstance(ensemble, ModelMixin)
    assert isinstance(ensemble, fastens.Ensemble)
    assert type(ensemble).__module__ == "fastens"
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ensemble(x, 3).sample, ensemble(x, 3, return_dict=False)[0])
        assert type(ensemble(x, 3)) is type(UNet2DModel.forward(randomised(lambda: unet_2d(False), 0), x, 3))
