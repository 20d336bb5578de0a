"""Every scheduler of the installed diffusers, guidance, random rules, MC Dropout and variance maps in its pipelines."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline

import fastens
from fastens.interop.diffusers import VarianceMaps
from tests.interop.loops import Looped
from tests.networks import randomised, small_unet, unet_2d_condition
from tests.tolerances import relative_error

# They step something else than an image's noise, or not in three steps; the model's interface is the same.
OTHERS = {
    "AmusedScheduler": "tokens",
    "VQDiffusionScheduler": "tokens",
    "DiscreteDDIMScheduler": "tokens",
    "EntropyBoundScheduler": "tokens",
    "BlockRefinementScheduler": "tokens",
    "PiflowScheduler": "policies, in ten times the channels",
    "DDPMWuerstchenScheduler": "one time for each sample, as a ratio",
    "SCMScheduler": "two steps",
}


def schedulers():
    """Those that step a model's output by one timestep."""
    found = []
    for name in dir(diffusers):
        scheduler = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if name in OTHERS or not inspect.isclass(scheduler) or not callable(getattr(scheduler, "step", None)):
            continue
        arguments = inspect.signature(scheduler.step).parameters
        required = {n for n, p in arguments.items() if p.default is inspect.Parameter.empty} - {
            "self",
            "kwargs",
            "args",
        }
        if required == {"model_output", "timestep", "sample"} and hasattr(scheduler, "set_timesteps"):
            found.append(name)
    return found


def sampled(model, scheduler, steps=4):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    torch.manual_seed(0)  # for those that take their noise from the global generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(scaled, t, return_dict=False)[0]
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


class Tupled(Looped):
    def forward(self, *args, **kwargs):
        return (torch.stack([member(*args, **kwargs)[0] for member in self.members]).mean(0),)


@pytest.mark.parametrize("name", schedulers())
def test_schedulers(name):
    members = [randomised(small_unet, seed) for seed in range(2)]
    with torch.no_grad():
        expected = sampled(Tupled(members), getattr(diffusers, name)())
        ours = sampled(fastens.Ensemble(members), getattr(diffusers, name)())
    assert relative_error(ours, expected) < 1e-3


class Encoder(torch.nn.Module):
    dtype = torch.float32


def stable_diffusion(model):
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def guided(model, **options):
    pipe = stable_diffusion(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 2, 4, 12, generator=generator).unbind(0)
    latents = torch.randn(2, 3, 8, 8, generator=generator)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        latents=latents,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=64,
        output_type="latent",
        **options,
    ).images


@pytest.fixture
def conditional():
    return [randomised(unet_2d_condition, seed) for seed in range(3)]


def test_stable_diffusion_with_guidance(conditional):
    assert (
        relative_error(guided(fastens.Ensemble(conditional)), guided(fastens.Ensemble(conditional, engine="loop")))
        < 1e-3
    )


def test_mixture_keeps_both_guided_rows_on_one_member(conditional):
    ensemble = fastens.Ensemble(conditional, "mixture")
    with ensemble.trajectory(2, 4):
        ours = guided(ensemble)
        members = ensemble._draws.members(ensemble.rule, ensemble._draws.begin(torch.zeros(2, 1)), 2).tolist()
    for i, k in enumerate(members):
        assert relative_error(ours[i], guided(conditional[k])[i]) < 1e-3


def test_fresh_masks_in_a_guided_pipeline(conditional):
    ensemble = fastens.MCDropout(conditional[0], 2, masks="fresh", p=0.1)
    runs = []
    for seed in (1, 1, 2):
        with ensemble.trajectory(2, seed):
            runs.append(guided(ensemble))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_variance_maps_take_no_second_pass(conditional):
    ensemble = fastens.Ensemble(conditional)
    passes = []
    handle = ensemble.network.register_forward_pre_hook(lambda *_: passes.append(1))
    expected = guided(ensemble)
    passes.clear()
    with VarianceMaps(ensemble, block=1, blocks=2) as maps:
        images = guided(ensemble, callback_on_step_end=maps)
    assert len(passes) == 3
    assert [step.shape for step in maps.steps] == [(2, 3, 8, 8)] * 3
    assert torch.equal(images, expected)
    assert all(step.min() >= 0 and step.max() > 0 for step in maps.steps)
    assert torch.equal(guided(ensemble), expected)
    handle.remove()
    with pytest.raises(ValueError, match="block 2 of 2"):
        VarianceMaps(ensemble, 2, 2)


def test_variance_maps_of_a_pipeline_without_callbacks():
    members = [randomised(small_unet, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    pipe = DDPMPipeline(ensemble, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with VarianceMaps(ensemble) as maps:
        pipe(2, num_inference_steps=4, output_type="np")
    assert len(maps.steps) == 4


def test_mc_dropout_in_a_pipeline_saves_and_reloads(tmp_path):
    ensemble = fastens.MCDropout(randomised(small_unet, 0), 3, p=0.1, seed=2)
    assert type(ensemble).__name__ == "DiffusersMCDropout"
    assert isinstance(ensemble, diffusers.ModelMixin)
    images = []
    pipe = DDIMPipeline(ensemble, DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    for each in (pipe, DDIMPipeline.from_pretrained(tmp_path)):
        each.set_progress_bar_config(disable=True)
        each.unet.eval()
        images.append(each(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_what_pipelines_ask_of_a_model():
    ensemble = fastens.Ensemble([randomised(unet_2d_condition, seed) for seed in range(2)])
    assert ensemble.config.time_cond_proj_dim is None
    assert (ensemble.dtype, ensemble.device) == (torch.float32, torch.device("cpu"))
    arguments = inspect.signature(ensemble.forward).parameters
    assert {"timestep_cond", "cross_attention_kwargs", "added_cond_kwargs", "encoder_hidden_states"} <= arguments.keys()
    pipe = stable_diffusion(ensemble).to(torch.float64)
    assert pipe.unet is ensemble
    assert ensemble.dtype == torch.float64


def test_another_pipeline_of_the_same_parts_is_given_the_ensemble(conditional):
    """``from_pipe`` keeps models of exactly the class that it names, and asks for any other by keyword."""
    pipe = stable_diffusion(fastens.Ensemble(conditional))
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet)
    assert other.unet is pipe.unet


def test_cache_context_of_a_transformer():
    def make():
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=[4, 4, 8],
        )

    members = [randomised(make, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    arguments = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    with torch.no_grad(), ensemble.cache_context("cond"):
        ours = ensemble(**arguments)[0]
        theirs = torch.stack([member(**arguments)[0] for member in members]).mean(0)
    assert relative_error(ours, theirs) < 1e-4
    assert ensemble.config.out_channels == members[0].config.out_channels
