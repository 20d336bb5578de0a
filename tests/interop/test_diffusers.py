"""diffusers' own pipelines, unmodified, with an ensemble as their model."""

import functools

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
from tests.networks import dit, randomised, small_unet
from tests.tolerances import NETWORK, relative_error


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
    members = [randomised(lambda: small_unet(True), seed) for seed in range(3)]
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
    ensemble = fastens.Ensemble([randomised(small_unet, seed) for seed in range(2)])
    assert isinstance(ensemble, ModelMixin)
    assert isinstance(ensemble, fastens.Ensemble)
    assert type(ensemble).__module__ == "fastens"
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ensemble(x, 3).sample, ensemble(x, 3, return_dict=False)[0])
        assert type(ensemble(x, 3)) is type(UNet2DModel.forward(randomised(small_unet, 0), x, 3))


def test_a_pipeline_moves_all_members():
    """`pipe.to` moves modules only; the ensemble is one, with all its members' weights, and says where it is."""
    ensemble = fastens.Ensemble([randomised(small_unet, seed) for seed in range(2)])
    pipe = DDIMPipeline(ensemble, DDIMScheduler())
    assert (pipe.unet.dtype, pipe.unet.device) == (torch.float32, torch.device("cpu"))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = ensemble.member_outputs(x, 3)
        pipe.to(torch.float64)
        assert {tensor.dtype for tensor in ensemble.parameters()} == {torch.float64}
        assert pipe.unet.dtype == torch.float64
        outputs = ensemble.member_outputs(x.double(), 3)
    assert outputs.dtype == torch.float64
    assert relative_error(outputs, expected) < NETWORK[torch.float32]
    pipe.to("meta")
    assert {tensor.device.type for tensor in ensemble.parameters()} == {"meta"} == {pipe.unet.device.type}


@pytest.mark.parametrize("rule", ["mean", "alternating"])
@pytest.mark.parametrize("t", [3, 3.0, torch.tensor(3), torch.tensor([3]), torch.tensor([3.0, 3.0])], ids=str)
def test_timesteps_of_every_kind(t, rule):
    members = [randomised(small_unet, 0)] * 2  # so that a draw does not matter
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ensemble = fastens.Ensemble(members, rule)
    with torch.no_grad():
        for _ in range(2):  # checked, then planned
            assert relative_error(ensemble(x, t).sample, members[0](x, t).sample) < NETWORK[torch.float32]
    assert ensemble.engine == "fold"


def test_an_offloading_hook_takes_the_whole_ensemble():
    """Offloading replaces the forward of every model of a pipeline: once for the ensemble, which moves as one."""
    ensemble = fastens.Ensemble([randomised(small_unet, seed) for seed in range(2)])
    pipe, moved = DDIMPipeline(ensemble, DDIMScheduler()), []
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    forward = ensemble.forward

    def hooked(module, *args, **kwargs):
        moved.append([p.device for p in module.parameters()])
        return forward(*args, **kwargs)

    ensemble.forward = functools.update_wrapper(functools.partial(hooked, ensemble), forward)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert (images == plain).all()
    assert len(moved) == 2
    assert len(moved[0]) == len(list(ensemble.parameters()))
