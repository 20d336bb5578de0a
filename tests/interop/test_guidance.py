"""Guidance in diffusers: the guider of modular pipelines, and a composition in a classic one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser
from torch import nn

import fastens
from fastens.composition import Guided, compose
from fastens.interop.guidance import EnsembleGuidance
from tests.networks import randomised, unet_2d, unet_2d_condition

B = 2


def text_unet():
    return unet_2d_condition(
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 4 * 6,
    )


def members(make=text_unet, number=3):
    return [randomised(make, seed).double() for seed in range(number)]


def state():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return SimpleNamespace(
        prompt_embeds=drawn(B, 5, 12),
        negative_prompt_embeds=drawn(B, 5, 12),
        add_time_ids=drawn(B, 6),
        negative_add_time_ids=drawn(B, 6),
        pooled_prompt_embeds=drawn(B, 6),
        negative_pooled_prompt_embeds=drawn(B, 6),
        num_inference_steps=10,
        scaled_latents=drawn(B, 2, 8, 8),
        timestep_cond=None,
        cross_attention_kwargs=None,
    )


def step(model, guider, i=4):
    """The step of diffusers' own modular pipeline that asks guider and network."""
    components, block = SimpleNamespace(unet=model, guider=guider), state()
    StableDiffusionXLLoopDenoiser()(components, block, i, torch.tensor(500))
    return block.noise_pred


def loop(rule, order, scale):
    """Member by member, branch by branch."""
    s, parts = state(), []
    for prefix in ("", "negative_"):
        added = {
            "time_ids": getattr(s, f"{prefix}add_time_ids"),
            "text_embeds": getattr(s, f"{prefix}pooled_prompt_embeds"),
        }
        prompt = getattr(s, f"{prefix}prompt_embeds")
        with torch.no_grad():
            parts.append([m(s.scaled_latents, 500, prompt, added_cond_kwargs=added).sample for m in members()])
    combine = fastens.rules.get(rule).combine
    cond, uncond = (torch.stack(part) for part in parts)
    if order == "after":
        cond, uncond = combine(cond), combine(uncond)
        return uncond + scale * (cond - uncond)
    return combine(uncond + scale * (cond - uncond))


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_the_guider_is_the_loop_in_a_modular_pipeline(rule, order):
    ensemble, rows = fastens.Ensemble(members(), rule), []
    guider = EnsembleGuidance(3.0, order=order)
    ensemble.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for _ in range(4):
        found = step(ensemble, guider)
        torch.testing.assert_close(found, loop(rule, order, 3.0), rtol=1e-9, atol=1e-9)
    assert "forward" not in ensemble.__dict__
    if order == "after":
        theirs = step(ensemble, ClassifierFreeGuidance(guidance_scale=3.0))
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


def test_the_guider_calls_the_ensemble_once_with_all_rows():
    ensemble, rows = fastens.Ensemble(members()), []
    guider = EnsembleGuidance(3.0)
    step(ensemble, guider)  # asks a copy of a member whether it mixes rows
    original = ensemble._evaluated
    ensemble.__dict__["_evaluated"] = lambda args, kwargs: rows.append(len(args[0])) or original(args, kwargs)
    step(ensemble, guider)
    assert rows == [2 * B]


def test_guidance_in_some_steps():
    ensemble = fastens.Ensemble(members())
    ours, theirs = (
        EnsembleGuidance(3.0, start=0.2, stop=0.5),
        ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.5),
    )
    for i in (0, 2, 4, 5, 9):
        torch.testing.assert_close(step(ensemble, ours, i), step(ensemble, theirs, i), rtol=1e-9, atol=1e-9)


def test_guiders_are_saved_and_made_anew(tmp_path):
    EnsembleGuidance(3.0, order="before").save_pretrained(tmp_path)
    again = EnsembleGuidance.from_pretrained(tmp_path)
    assert (again.guidance_scale, again.order) == (3.0, "before")
    assert again.new(guidance_scale=2.0).guidance_scale == 2.0


def test_what_the_guider_refuses():
    with pytest.raises(ValueError, match="order 'during'"):
        EnsembleGuidance(order="during")
    with pytest.raises(TypeError, match=r"expected a fastens\.Ensemble"):
        step(members(number=1)[0], EnsembleGuidance(3.0))
    ensemble = fastens.Ensemble(members())
    with fastens.interop.diffusers.VarianceMaps(ensemble), pytest.raises(RuntimeError, match="watches the calls"):
        step(ensemble, EnsembleGuidance(3.0))


def class_unet():
    return unet_2d(False, add_attention=True, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=4)


class ByHand(nn.Module):
    def __init__(self, members, labels, null, scale):
        super().__init__()
        self.members, self.labels, self.null, self.scale = nn.ModuleList(copy.deepcopy(members)), labels, null, scale
        self.config, self.dtype, self.device = members[0].config, torch.float64, torch.device("cpu")

    def forward(self, x, t):
        cond, uncond = (
            torch.stack([m(x, t, labels).sample for m in self.members]).mean(0)
            for labels in (self.labels, torch.full_like(self.labels, self.null))
        )
        return SimpleNamespace(sample=uncond + self.scale * (cond - uncond))


def test_a_composition_in_a_classic_pipeline():
    nets, labels = members(class_unet), torch.tensor([0, 2])
    ensemble = fastens.Ensemble(nets)
    guided = compose(ensemble, Guided(2.5, conditional={"class_labels": labels}, unconditional={"class_labels": 3}))

    def run(model):
        pipeline = DDIMPipeline(unet=model, scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
        )

    torch.testing.assert_close(run(guided), run(ByHand(nets, labels, 3, 2.5)), rtol=1e-6, atol=1e-6)
