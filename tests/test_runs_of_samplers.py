"""Samplers of others, unmodified: one run of all members is the members' own runs, to the last digits of float64."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import nn

import fastens
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from tests.interop.libraries import library
from tests.interop.test_edm import Preconditioned, edm_sampler
from tests.interop.test_k_diffusion import Epsilon
from tests.interop.test_k_diffusion import denoiser as k_denoiser
from tests.interop.test_score_sde import Network, score_function
from tests.networks import randomised, small_unet
from tests.tolerances import relative_error
from tests.whole_runs import CONDITION, DOUBLE, K, N, alone, runs_are_made_together, together, unets  # noqa: F401

SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM, eta": (DDIMScheduler, {"eta": 1.0}),
    "DDPM": (DDPMScheduler, {}),
    "DPM++": (DPMSolverMultistepScheduler, {}),
    "DPM++, SDE": (lambda **kw: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **kw), {}),
    "DPM++, Brownian tree": (DPMSolverSDEScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers(name, guidance):
    make, options = SCHEDULERS[name]
    members = unets()

    def with_model(model):
        scheduler = make(num_train_timesteps=1000)

        def sample(num):
            scheduler.set_timesteps(4)
            x = torch.randn(num, 1, 8, 8, dtype=torch.float64) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(x, t)
                if guidance is None:
                    output = model(given, t).sample
                else:
                    plain, conditional = model(torch.cat([given, given + 0.1]), t).sample.chunk(2)
                    output = plain + guidance * (conditional - plain)
                x = scheduler.step(output, t, x, **options).prev_sample
            return x

        return sample

    ensemble = fastens.Ensemble(members)
    assert relative_error(together(with_model, ensemble), alone(with_model, members)) < DOUBLE
    assert ensemble.engine == "fold"


@pytest.mark.parametrize("name", ["sample_heun", "sample_euler_ancestral", "sample_dpmpp_2m", "sample_dpmpp_sde"])
@pytest.mark.parametrize("given", [{}, {"cond": CONDITION}], ids=["plain", "extra_args"])
def test_samplers_of_k_diffusion(name, given):
    sampling = library("k_diffusion.sampling")
    members = [Float(randomised(Epsilon, k).double()) for k in range(K)]
    churn = {"s_churn": 3.0} if name == "sample_heun" else {}

    def with_model(model):
        def sample(num):
            sigmas = sampling.get_sigmas_karras(4, 0.1, 5.0).double()
            x = torch.randn(num, 2, 8, 8, dtype=torch.float64) * 5
            sampler = getattr(sampling, name)
            return sampler(k_denoiser(model).double(), x, sigmas, extra_args=given, disable=True, **churn)

        return sample

    ensemble = fastens.Ensemble(members)
    assert relative_error(together(with_model, ensemble), alone(with_model, members)) < DOUBLE


class Float(nn.Module):
    """A network in float64 whose ``t.float()`` is undone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, cond=None):
        emb = self.network.time(t[:, None] / 1000)[:, :, None, None]
        out = self.network.outer(torch.tanh(self.network.inner(x) + emb))
        return out if cond is None else out + cond


class Double(Preconditioned):
    """EDM's preconditioning in float64."""

    precision = torch.float64


@pytest.mark.parametrize("churn", [0.0, 10.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_sampler_of_edm_owns_its_generator(churn, guidance):
    members = [randomised(Double, k).double() for k in range(K)]
    guide = randomised(Double, 7).double()  # autoguidance: a network that all members share
    labels = torch.eye(3, dtype=torch.float64)[:N]

    def with_model(net):
        def sample(num):
            noise = torch.randn(num, 2, 8, 8, dtype=torch.float64)
            other = {"guide": guide, "guidance": guidance} if guidance != 1 else {}
            return edm_sampler(net, noise, labels, churn=churn, **other)

        return sample

    ensemble = fastens.Ensemble(members)
    assert relative_error(together(with_model, ensemble), alone(with_model, members)) < DOUBLE


def predictor_corrector(model, steps=4, snr=0.16):
    """Algorithms 2, 4 and 5 of arXiv 2011.13456: the corrector's step is a mean over the batch."""

    def sample(num):
        x = torch.randn(num, 2, 8, 8, dtype=torch.float64)
        for now in torch.linspace(1, 1e-2, steps, dtype=torch.float64):
            t = now.expand(num)
            grad, noise = score_function(model)(x, t), torch.randn_like(x)
            grad_norm = torch.norm(grad.reshape(grad.shape[0], -1), dim=-1).mean()
            noise_norm = torch.norm(noise.reshape(noise.shape[0], -1), dim=-1).mean()
            step = ((snr * noise_norm / grad_norm) ** 2 * 2 * torch.ones_like(t))[:, None, None, None]
            x = x + step * grad + torch.sqrt(step * 2) * noise
            beta, dt = 0.1 + 19.9 * now, -1 / steps
            mean = x + (-beta * x / 2 - beta * score_function(model)(x, t)) * dt
            x = mean + (beta * -dt).sqrt() * torch.randn_like(x)
        return mean

    return sample


def test_a_corrector_that_mixes_the_batch_mixes_no_members():
    members = [randomised(Network, k).double() for k in range(K)]
    ours = together(predictor_corrector, fastens.Ensemble(members))
    assert relative_error(ours, alone(predictor_corrector, members)) < DOUBLE


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_pipelines_of_diffusers(kind, output_type):
    members = unets(torch.float32)
    scheduler = {DDIMPipeline: DDIMScheduler, DDPMPipeline: DDPMScheduler}[kind](num_train_timesteps=1000)
    ensemble = fastens.Ensemble(members)

    def run(pipe, call):
        pipe.set_progress_bar_config(disable=True)
        return call(pipe)

    options = {"num_inference_steps": 3, "output_type": output_type}
    ours = run(kind(ensemble, scheduler), lambda p: fastens.sample_members(p, None, N, generator=5, **options))
    theirs = [
        run(kind(m, scheduler), lambda p: p(N, torch.Generator().manual_seed(5), **options).images) for m in members
    ]
    if output_type == "pil":
        ours, theirs = [[np.asarray(x) / 255 for x in row] for row in ours], np.asarray(theirs) / 255
    assert np.shape(ours) == (K, N, 8, 8, 1)[: np.ndim(theirs)]
    np.testing.assert_allclose(ours, theirs, atol=1e-3 if output_type == "np" else 1 / 200)


@pytest.mark.parametrize(("method", "options"), [("ddim", {"eta": 1.0}), ("euler", {}), ("heun", {})])
def test_our_sampler(method, options):
    members, schedule = [randomised(small_unet, k).double() for k in range(K)], fastens.schedules.VP()

    def sampler(model):
        return Sampler(Denoiser(model, schedule, "epsilon"), method, steps=3, **options)

    ours = sampler(fastens.Ensemble(members))
    theirs = torch.stack([sampler(member)(N, (1, 8, 8), 3) for member in members])
    found = fastens.sample_members(ours, None, N, shape=(1, 8, 8), generator=3)
    assert relative_error(found, theirs) < DOUBLE
    apart = fastens.sample_members(ours, None, N, shape=(1, 8, 8), generator=3, shared_noise=False)
    own = [sampler(m)(torch.arange(k * N, (k + 1) * N), (1, 8, 8), 3) for k, m in enumerate(members)]
    assert relative_error(apart, torch.stack(own)) < DOUBLE
