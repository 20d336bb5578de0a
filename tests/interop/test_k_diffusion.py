"""k-diffusion's own samplers, with an ensemble as the wrapped model or as the denoiser."""

import pytest
import torch
from torch import nn

import fastens
from fastens.interop.k_diffusion import CompVis
from tests.interop.libraries import library
from tests.interop.loops import Looped
from tests.networks import randomised
from tests.tolerances import relative_error

external, sampling = library("k_diffusion.external"), library("k_diffusion.sampling")


class Epsilon(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.time = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(1, 8)
        self.outer = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t, cond=None):
        emb = self.time(t.float()[:, None] / 1000)[:, :, None, None]
        return self.outer(torch.tanh(self.inner(x) + emb)) + (0 if cond is None else cond)


class Latent(nn.Module):
    """As CompVis: forward is a loss, apply_model the network."""

    def __init__(self):
        super().__init__()
        self.model = Epsilon()
        self.register_buffer("alphas_cumprod", torch.linspace(0.999, 0.01, 1000))

    def apply_model(self, x, t, cond):
        return self.model(x, t, cond)

    def forward(self, x):
        raise AssertionError("this is the training loss")


@pytest.fixture
def members():
    return [randomised(Epsilon, seed) for seed in range(3)]


def denoiser(model):
    return external.DiscreteEpsDDPMDenoiser(model, torch.linspace(0.999, 0.01, 1000), quantize=False)


@pytest.mark.parametrize(
    "name", ["sample_euler", "sample_heun", "sample_lms", "sample_dpmpp_2m", "sample_dpmpp_2s_ancestral"]
)
@pytest.mark.parametrize("given", [{}, {"cond": torch.ones(1, 2, 1, 1)}], ids=["plain", "extra_args"])
def test_samplers(members, name, given):
    samples = []
    for model in (fastens.Ensemble(members), Looped(members)):
        wrapped = denoiser(model)
        sigmas = sampling.get_sigmas_karras(5, 0.1, 5.0)
        torch.manual_seed(0)
        x = torch.randn(3, 2, 8, 8) * 5
        with torch.no_grad():
            samples.append(getattr(sampling, name)(wrapped, x, sigmas, extra_args=given, disable=True))
    assert relative_error(*samples) < 1e-4


def test_churn_keeps_the_members_of_a_mixture(members):
    ensemble = fastens.Ensemble(members, "mixture")
    sigmas = sampling.get_sigmas_karras(5, 0.1, 5.0)
    with torch.no_grad(), ensemble.trajectory(2, 0):
        drawn = ensemble._draws.members(ensemble.rule, ensemble._draws.begin(torch.zeros(2, 1)), 2)
        torch.manual_seed(0)
        x = torch.randn(2, 2, 8, 8) * 5
        torch.manual_seed(1)
        ours = sampling.sample_heun(denoiser(ensemble), x, sigmas, s_churn=2.0, disable=True)
    for i, k in enumerate(drawn.tolist()):
        torch.manual_seed(1)
        theirs = sampling.sample_heun(denoiser(members[k]), x, sigmas, s_churn=2.0, disable=True)
        assert relative_error(ours[i], theirs[i].detach()) < 1e-3


def test_log_likelihood_needs_gradients_and_a_field(members):
    values = []
    for model in (fastens.Ensemble(members), Looped(members)):
        torch.manual_seed(0)
        x = torch.randn(2, 2, 4, 4)
        values.append(sampling.log_likelihood(denoiser(model), x, 0.1, 5.0, atol=1e-3, rtol=1e-3)[0])
    assert relative_error(*values) < 1e-3
    with pytest.raises(RuntimeError, match="adaptive solver"):
        sampling.log_likelihood(denoiser(fastens.Ensemble(members, "alternating")), x, 0.1, 5.0)
    model = denoiser(fastens.Ensemble(members, "alternating"))
    with pytest.raises(RuntimeError, match="adaptive solver"):
        sampling.sample_dpm_adaptive(model, x, 0.1, 5.0, disable=True)


def test_compvis_models_are_called_by_apply_model():
    models = [randomised(Latent, seed) for seed in range(2)]
    ensemble = fastens.Ensemble([CompVis(model) for model in models])
    wrapped = external.CompVisDenoiser(ensemble)
    x, sigma, cond = torch.randn(3, 2, 8, 8), torch.full((3,), 2.0), torch.ones(3, 2, 1, 1)
    with torch.no_grad():
        apart = torch.stack([external.CompVisDenoiser(model)(x, sigma, cond=cond) for model in models]).mean(0)
        assert relative_error(wrapped(x, sigma, cond=cond), apart) < 1e-5
    with pytest.raises(TypeError, match="wrap each"):
        fastens.Ensemble(models)
