"""denoising-diffusion-pytorch's own diffusion classes, which clamp what the model returns in place."""

import copy

import pytest
import torch

import fastens
from tests.interop.libraries import library
from tests.interop.loops import Looped
from tests.networks import randomised
from tests.tolerances import relative_error

lucid = library("denoising_diffusion_pytorch")
guidance = library("denoising_diffusion_pytorch.classifier_free_guidance")


def unet(**options):
    return lucid.Unet(8, dim_mults=(1, 2), channels=1, flash_attn=False, **options)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("steps", [4, 20], ids=["ddim", "ddpm"])
def test_sampling(self_condition, steps, monkeypatch):
    """Held to the members in float64: where a step is fed its last result, rounding grows, the loop's own as ours."""
    members = [randomised(lambda: unet(self_condition=self_condition), seed) for seed in range(2)]
    ensemble, randn, randn_like = fastens.Ensemble(members), torch.randn, torch.randn_like

    def sampled(model):
        diffusion = lucid.GaussianDiffusion(
            model, image_size=8, timesteps=20, sampling_timesteps=steps, objective="pred_x0"
        )
        torch.manual_seed(0)
        return diffusion.to(torch.get_default_dtype()).sample(batch_size=2)

    ours = sampled(ensemble)  # in inference mode
    assert ensemble.report().plans, ensemble.report().why_no_plan
    wide = Looped([copy.deepcopy(member).double() for member in members])
    monkeypatch.setattr(torch, "randn", lambda *a, **k: randn(*a, **{**k, "dtype": torch.float32}).double())
    monkeypatch.setattr(torch, "randn_like", lambda x: randn_like(x.float()).double())
    torch.set_default_dtype(torch.float64)
    try:
        exact = sampled(wide)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(ours, exact) < 1e-4


def test_clamping_in_place_reaches_no_buffer_of_ours():
    ensemble = fastens.Ensemble([randomised(unet, seed) for seed in range(2)])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 3])
    with torch.no_grad():
        first = ensemble(x, t, None)
        kept = first.clone()
        first.clamp_(-0.01, 0.01)
        assert torch.equal(ensemble(x, t, None), kept)


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_mc_dropout(masks):
    network = randomised(lambda: unet(dropout=0.2), 0)
    ensemble = fastens.MCDropout(network, 2, masks=masks)
    diffusion = lucid.GaussianDiffusion(ensemble, image_size=8, timesteps=10, sampling_timesteps=3)
    assert diffusion.sample(batch_size=2).shape == (2, 1, 8, 8)
    assert ensemble.engine == "fold"


def test_methods_that_call_forward_call_the_ensembles():
    def make():
        return guidance.Unet(8, num_classes=4, dim_mults=(1,), channels=1, cond_drop_prob=0.0)

    members = [randomised(make, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    x, t, classes = torch.randn(2, 1, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 1])
    with torch.no_grad():
        ours = ensemble.forward_with_cond_scale(x, t, classes, cond_scale=2.0, remove_parallel_component=False)
        theirs = [
            m.forward_with_cond_scale(x, t, classes, cond_scale=2.0, remove_parallel_component=False) for m in members
        ]
    ours, theirs = (ours[0], [each[0] for each in theirs]) if isinstance(ours, tuple) else (ours, theirs)
    assert relative_error(ours, torch.stack(theirs).mean(0)) < 1e-4
