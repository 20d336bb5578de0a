"""``weight.data = ...`` of the same memory in another layout or shape: no version and no address changes by it."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K, X = 3, torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Weights whose shapes its Python reads, a parameter and a buffer among them."""

    def __init__(self):
        super().__init__()
        self.square, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(6, 4))
        self.register_buffer("noise", torch.randn(6, 4))

    def forward(self, x):
        return torch.tanh(self.square(x)) + self.table.sum(0) * len(self.table) + self.noise.square().mean(0)


CHANGES = {
    "transposed": ("square.weight", lambda w: w.mT),
    "fewer rows": ("table", lambda w: w[..., :2, :]),
    "rows that are one": ("table", lambda w: w[..., :1, :].expand_as(w)),
    "fewer rows of a buffer": ("noise", lambda w: w[..., :3, :]),
}


def changed(network, name, change):
    """Give a tensor of a network, or a stack of an ensemble's, other data."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors[name].data = change(tensors[name].data)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_the_answer_is_that_of_members_in_that_layout(name, change, calls, engine):
    members = [randomised(Net, seed) for seed in range(K)]
    ensemble = fastens.Ensemble([copy.deepcopy(member) for member in members], engine=engine)
    for _ in range(calls):
        ensemble(X)
    changed(ensemble.network, name, change)
    for member in members:
        changed(member, name, change)
    expected = torch.stack([member(X) for member in members]).mean(0)
    for _ in range(2):
        assert relative_error(ensemble(X), expected) < 1e-5
    assert ensemble.engine == ("loop" if engine == "loop" else "fold")
