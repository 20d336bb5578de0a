"""EDM and EDM2: their samplers from the papers' algorithms, over networks preconditioned as theirs."""

import pickle
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from tests.interop.loops import Looped
from tests.networks import randomised
from tests.tolerances import relative_error


class Preconditioned(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), arXiv 2206.00364 table 1; dropout by function only."""

    precision = torch.float32

    def __init__(self, sigma_min=0.0, sigma_max=float("inf"), sigma_data=0.5):
        super().__init__()
        self.img_channels, self.img_resolution, self.label_dim = 2, 8, 3
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = nn.ModuleDict(
            {"inner": nn.Conv2d(2, 8, 3, padding=1), "noise": nn.Linear(1, 8), "label": nn.Linear(3, 8)}
        )
        self.outer = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, sigma, class_labels=None):
        x = x.to(self.precision)
        sigma = sigma.to(self.precision).reshape(-1, 1, 1, 1)
        labels = torch.zeros(1, 3) if class_labels is None else class_labels.reshape(-1, 3)
        labels = labels.to(self.precision)
        data = self.sigma_data
        emb = self.model["noise"]((sigma.flatten().log() / 4)[:, None]) + self.model["label"](labels)
        h = torch.tanh(self.model["inner"](x / (data**2 + sigma**2).sqrt()) + emb[:, :, None, None])
        out = self.outer(F.dropout(h, p=0.1, training=self.training))
        return data**2 / (sigma**2 + data**2) * x + sigma * data / (sigma**2 + data**2).sqrt() * out

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


class OtherPreconditioner(Preconditioned):
    pass


def edm_sampler(net, noise, labels=None, steps=4, churn=0.0, low=0.002, high=80.0, rho=7, guide=None, guidance=1.0):
    """Algorithm 2 of arXiv 2206.00364, in float64; with ``guide``, autoguidance as in arXiv 2406.02507."""

    def denoise(x, t):
        main = net(x, t, labels).to(torch.float64)
        return main if guide is None else guide(x, t, labels).to(torch.float64).lerp(main, guidance)

    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    levels = torch.cat([net.round_sigma(levels), torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(1)
    x = noise.to(torch.float64) * levels[0]
    for now, then in pairwise(levels):
        raised = net.round_sigma(now * (1 + min(churn / steps, np.sqrt(2) - 1)))
        x = x + (raised**2 - now**2).sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        slope = (x - denoise(x, raised)) / raised
        other = x + (then - raised) * slope
        if then > 0:
            other = x + (then - raised) * (slope + (other - denoise(other, then)) / then) / 2
        x = other
    return x


@pytest.fixture
def noise():
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("churn", [0.0, 10.0])
@pytest.mark.parametrize("labels", [None, torch.eye(3)], ids=["plain", "labels"])
def test_sampler(noise, churn, labels):
    members = [randomised(Preconditioned, seed) for seed in range(3)]
    with torch.no_grad():
        ensemble = fastens.Ensemble(members)
        ours = edm_sampler(ensemble, noise, labels, churn=churn)
        assert relative_error(ours, edm_sampler(Looped(members), noise, labels, churn=churn)) < 1e-4
    assert ensemble.engine == "fold"
    assert (ensemble.img_channels, ensemble.img_resolution, ensemble.label_dim) == (2, 8, 3)


@pytest.mark.parametrize("rule", ["mixture", "alternating"])
def test_random_rules_through_heun_and_churn(noise, rule):
    ensemble = fastens.Ensemble([randomised(Preconditioned, seed) for seed in range(3)], rule)
    runs = []
    for _ in range(2):
        with torch.no_grad(), ensemble.trajectory(3, torch.Generator().manual_seed(0)):
            runs.append(edm_sampler(ensemble, noise, churn=10.0))
    assert torch.equal(*runs)


def test_serves_the_levels_that_every_member_serves():
    members = [
        randomised(lambda low=low, high=high: Preconditioned(low, high), 0) for low, high in ((0.01, 90), (0.02, 80))
    ]
    with pytest.warns(UserWarning, match="one by one"):
        ensemble = fastens.Ensemble(members)
    assert (ensemble.sigma_min, ensemble.sigma_max) == (0.02, 80)
    assert fastens.Ensemble(members[:1] * 2).sigma_min == 0.01
    assert fastens.MCDropout(members[0], 2).sigma_max == 90


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (OtherPreconditioner, "preconditioned by OtherPreconditioner"),
        (lambda: Preconditioned(sigma_data=1.0), "sigma_data"),
    ],
)
def test_mixed_preconditioners_are_refused(other, message):
    members = [randomised(Preconditioned, 0), randomised(other, 1)]
    with pytest.raises(ValueError, match=message):
        fastens.Ensemble(members, engine="loop")


def test_mc_dropout_catches_functional_dropout(noise):
    network = randomised(Preconditioned, 0)
    ensemble = fastens.MCDropout(network, 3)
    with torch.no_grad():
        assert torch.equal(edm_sampler(ensemble, noise), edm_sampler(ensemble, noise))
        assert relative_error(edm_sampler(ensemble, noise), edm_sampler(network, noise)) > 1e-4


def test_autoguidance_over_an_ensemble(noise):
    ensemble = fastens.Ensemble([randomised(Preconditioned, seed) for seed in range(2)])
    guide = randomised(Preconditioned, 9)
    with torch.no_grad():
        assert edm_sampler(ensemble, noise, guide=guide, guidance=2.0).isfinite().all()


def test_pickles_only_with_an_opt_in(tmp_path, noise, monkeypatch):
    network = randomised(Preconditioned, 0)
    module = types.ModuleType("edm_training_code")
    module.Preconditioned = Preconditioned
    monkeypatch.setitem(sys.modules, "edm_training_code", module)
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": network, "loss_fn": None}))
    with pytest.raises(ValueError, match="allow_pickle=True"):
        fastens.load_members([path])
    ensemble = fastens.Ensemble(fastens.load_members([path, path], allow_pickle=True))
    with torch.no_grad():
        sigma = torch.tensor(1.0, dtype=torch.float64)
        assert relative_error(ensemble(noise.double(), sigma), network(noise.double(), sigma)) < 1e-5
