"""Whole runs of every member at once, and the members' own runs that they are held against."""

import warnings

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised, small_unet

K, N = 3, 2
DOUBLE = 1e-10
CONDITION = torch.randn(N, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def runs_are_made_together():
    """A warning that they are not is a failure, where a test does not expect it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fastens: the members' runs")
        yield


def unets(dtype=torch.float64):
    return [randomised(lambda: small_unet(True), k).to(dtype) for k in range(K)]


def alone(sample, models, seed=0):
    """Each member's own run, from one seed."""
    found = []
    for model in models:
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(sample(model)(N))
    return torch.stack(found)


def together(sample, ensemble, seed=0, **options):
    torch.manual_seed(seed)
    return fastens.sample_members(sample(ensemble), None, N, ensemble=ensemble, **options)


class Which(nn.Module):
    """A member that returns its own number, so that it can be read off; and adds a condition."""

    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor([float(number)]))

    def forward(self, x, condition=0.0):
        return x * 0 + self.number + condition


def steps(ensemble, count=4, condition=0.0, noise=torch.randn_like):
    """Adds up what the ensemble returns, and then noise."""

    def sample(num, condition=condition):
        x = torch.randn(num, 3)
        for _ in range(count):
            x = x + ensemble(x, condition) + noise(x)
        return x

    return sample
