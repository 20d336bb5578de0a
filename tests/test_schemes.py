"""Sampler-level schemes: mean of samples, averaged noise, score noise."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import fastens
from fastens.schemes import ScoreNoise, averaged_noise, mean_of_samples
from tests.networks import mlp, randomised, small_unet
from tests.tolerances import relative_error


def sample(member, generator):
    x = torch.randn(3, 5, generator=generator)
    for _ in range(3):
        x = x - 0.1 * member(x).detach() + 0.1 * torch.randn(3, 5, generator=generator)
    return x


def test_mean_of_samples_shares_the_noise():
    members = [randomised(mlp, seed) for seed in range(3)]
    ends = [sample(member, torch.Generator().manual_seed(4)) for member in members]
    assert relative_error(mean_of_samples(fastens.Ensemble(members), sample, seed=4), torch.stack(ends).mean(0)) < 1e-5


@pytest.mark.parametrize("num_members", [1, 4, 9])
def test_averaged_noise_has_a_smaller_deviation_after_the_first(num_members):
    torch.manual_seed(0)
    with averaged_noise(num_members):
        first, noise = torch.randn(20000), torch.randn_like(torch.empty(20000))
    assert abs(first.std() - 1) < 0.03
    assert abs(noise.std() - num_members**-0.5) < 0.03


def test_averaged_noise_reaches_a_diffusers_pipeline():
    pipe = DDPMPipeline(randomised(small_unet, 0), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    runs = []
    for scope in (averaged_noise(1), averaged_noise(5)):
        with scope:
            runs.append(pipe(1, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images)
    assert abs(runs[0] - runs[1]).max() > 1e-3


def test_score_noise_is_fixed_and_as_large_as_said():
    network = randomised(mlp, 0)
    noisy = ScoreNoise(fastens.Ensemble([network]), 0.3)
    x = torch.randn(6, 5)
    with torch.no_grad():
        added = noisy(x) - network(x)
        assert torch.equal(noisy(x), noisy(x))
        assert relative_error(added.norm(dim=1), 0.3 * network(x).norm(dim=1)) < 1e-4
        assert relative_error(noisy(x[:2]), noisy(x)[:2]) < 1e-5
    assert noisy.num_members == 1
