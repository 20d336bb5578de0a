"""deepinv's posterior samplers, unmodified, with an ensemble as their denoiser: all members' reconstructions."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import fastens
from tests.interop.libraries import library
from tests.networks import randomised, small_unet
from tests.tolerances import relative_error

deepinv = library("deepinv")
K, N = 3, 2
CUMULATED = torch.linspace(0.9999, 0.9766, 1000, dtype=torch.float64).cumprod(0)  # alpha bar of a DDPM


class FindsData(nn.Module):
    """A network that finds noise as deepinv's denoisers are called: images in [0, 1] under noise of deviation sigma."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, sigma, **kwargs):
        x = x.double()
        sigma = 2 * torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        t = (((1 - CUMULATED) / CUMULATED).sqrt() - sigma.flatten()[:1]).abs().argmin()
        noise = self.network((2 * x - 1) / (1 + sigma**2).sqrt(), t).sample
        return (2 * x - 1 - sigma * noise) / 2 + 0.5


def diffpir(denoiser, physics, y):
    sampler = deepinv.sampling.DiffPIR(denoiser, deepinv.optim.L2(), sigma=0.05, max_iter=4, device="cpu")
    return lambda num: sampler(y.expand(num, *y.shape[1:]), physics)


def dps(denoiser, physics, y):
    sampler = deepinv.sampling.DPS(denoiser, num_steps=4)
    return lambda num: sampler(y.expand(num, *y.shape[1:]), physics, x_init=(num, 1, 8, 8))


@pytest.mark.parametrize("make", [diffpir, dps])
def test_posterior_samplers(make):
    members = [FindsData(randomised(small_unet, k)).double().eval() for k in range(K)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    mask[..., 2:6, 2:6] = 0
    physics = deepinv.physics.Inpainting((1, 8, 8), mask=mask)
    y = physics(torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ensemble = fastens.Ensemble(members)
    torch.manual_seed(0)
    ours = fastens.sample_members(make(ensemble, physics, y), None, N, ensemble=ensemble)
    theirs = []
    for member in members:
        torch.manual_seed(0)
        theirs.append(make(member, physics, y)(N).detach())
    assert relative_error(ours, torch.stack(theirs)) < 1e-10


@pytest.mark.filterwarnings("error:fastens")
def test_the_example(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples" / "super_resolution")
    module = importlib.import_module("by_deepinv")
    for name, value in {"PATCHES": 3, "SAMPLES": 2, "STEPS": 3}.items():
        monkeypatch.setattr(module, name, value)
    module.main()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["DiffPIR", "DPS"]
