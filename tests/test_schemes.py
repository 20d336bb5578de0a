"""Sampler-level schemes: mean of samples, averaged noise, score noise."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import fastens
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from fastens.schedules import VP
from fastens.schemes import ScoreNoise, averaged_noise, mean_of_samples
from tests.networks import mlp, randomised, small_unet
from tests.tolerances import relative_error


class Timed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, t):
        return self.net(x)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mean_of_samples_is_added_up_wide(dtype):
    ends = iter(torch.tensor([[40000.0, 1.0], [40000.0, 2.0**-9], [40000.0, 2.0**-9]], dtype=dtype))
    mean = mean_of_samples(fastens.Ensemble([randomised(mlp, k) for k in range(3)]), lambda *_: next(ends))
    expected = torch.tensor([[40000.0, 1.0], [40000.0, 2.0**-9], [40000.0, 2.0**-9]], dtype=dtype).double().mean(0)
    assert mean.dtype == dtype
    assert torch.equal(mean, expected.to(dtype))


def test_mean_of_bytes_is_refused():
    images = torch.full((2, 3), 200, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"expected a floating-point dtype; .*end\.float\(\)"):
        mean_of_samples(fastens.Ensemble([randomised(mlp, k) for k in range(3)]), lambda *_: images)


def test_averaged_noise_is_what_a_given_tensor_holds():
    given = torch.empty(20000)
    with averaged_noise(16, first=0):
        returned = torch.randn(20000, out=given)
    assert returned is given
    assert abs(given.std() - 0.25) < 0.01


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_averaged_noise_says_what_it_does_not_reach(eta):
    sampler = Sampler(Denoiser(fastens.Ensemble([randomised(Timed, 0)]), VP(), "epsilon"), steps=3, eta=eta)
    expected = sampler(2, (5,))
    with averaged_noise(4):
        if eta:
            with pytest.raises(RuntimeError, match="sampler_step takes its noise from counters"):
                sampler(2, (5,))
        else:
            assert torch.equal(sampler(2, (5,)), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 2, 3)])
def test_score_noise_of_any_shape_keeps_float64(shape):
    score = torch.randn(shape, dtype=torch.float64)
    rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    expected = [s + 0.3 * s.norm() / (z.norm() + 1e-8) * z for s, z in zip(score, rows, strict=True)]
    torch.testing.assert_close(ScoreNoise(torch.nn.Identity(), 0.3)(score), torch.stack(expected), rtol=0, atol=1e-14)
