"""torchcfm's models under torchdiffeq: model(t, x) with a time without batch."""

import torch
from torchdiffeq import odeint

import fastens
from tests.interop.libraries import library
from tests.networks import randomised
from tests.tolerances import relative_error

UNetModel = library("torchcfm.models.unet").UNetModel


def unet():
    return UNetModel(dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2))


def members(count=2):
    return [randomised(unet, seed) for seed in range(count)]


def test_fixed_and_adaptive_solvers():
    networks = members()
    ensemble = fastens.Ensemble(networks)
    x, times = torch.randn(2, 1, 8, 8), torch.linspace(0, 1, 3)

    def looped(t, x):
        return torch.stack([network(t, x) for network in networks]).mean(0)

    with torch.no_grad():
        for options in ({"method": "euler"}, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}):
            assert relative_error(odeint(ensemble, x, times, **options), odeint(looped, x, times, **options)) < 1e-3
    assert ensemble.engine == "fold"
    assert not hasattr(ensemble, "t")  # torchdyn takes a module with an attribute t for one that wants the time


def test_signature_has_the_time():
    # torchdyn wraps modules whose forward has no argument t
    import inspect

    assert list(inspect.signature(fastens.Ensemble(members(1)).forward).parameters)[:2] == ["t", "x"]
    assert "t" in inspect.getfullargspec(fastens.Ensemble(members(1)).forward).args
