"""Rows that are evaluated each by itself, until a weight or an attribute of the members lets them meet."""

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import relative_error

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ROWS = [0, 2, 1]


class Mixing(nn.Module):
    """A network that adds the mean of the batch, as strongly as its weight or its switch says."""

    def __init__(self, shape):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.strength = nn.Parameter(torch.zeros(shape))
        self.mixes = False

    def forward(self, x):
        h = self.layer(x)
        h = h + self.strength * h.mean(0, keepdim=True)
        return h + h.mean(0, keepdim=True) if self.mixes else h


def by_weight(network, scale):
    with torch.no_grad():
        network.strength.fill_(scale)


def by_switch(network, scale):
    network.mixes = True


CHANGES = {
    "a weight": (by_weight, ()),
    "weights of channels": (by_weight, (4,)),
    "a weight that was small": (by_weight, ()),
    "an attribute": (by_switch, ()),
}


@pytest.fixture(params=CHANGES)
def mixing(request):
    change, shape = CHANGES[request.param]
    torch.manual_seed(0)
    members = [Mixing(shape) for _ in range(3)]
    if request.param == "a weight that was small":
        for member in members:
            by_weight(member, 1e-9)
    return members, change


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_members_are_those_of_the_whole_batch(mixing, grad):
    members, change = mixing
    ensemble = fastens.Ensemble(members)
    with torch.set_grad_enabled(grad):
        for changed in (False, True):
            for network in (*members, ensemble.network) if changed else ():
                change(network, 1.0)
            for _ in range(3):
                expected = torch.stack([members[k](X)[i] for i, k in enumerate(ROWS)])
                with ensemble.assigned(ROWS):
                    assert relative_error(ensemble(X), expected) < 1e-5


class Apart(nn.Module):
    """A network that mixes no rows, whose last layer is zero and that fills a cache."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.shape = nn.Linear(4, 4), nn.Linear(4, 4), None
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        if self.shape is None:
            self.shape = tuple(x.shape)
        return self.last(torch.tanh(self.first(x)))


def test_rows_that_nothing_mixes_are_found_once(monkeypatch):
    ensemble, calls = fastens.Ensemble([Apart() for _ in range(3)]), []
    with ensemble.assigned(ROWS):
        for _ in range(2):
            ensemble(X)
        engine = type(ensemble._engine)
        call_module = engine.call_module
        monkeypatch.setattr(engine, "call_module", lambda self, *a: (calls.append(1), call_module(self, *a))[1])
        for _ in range(3):
            ensemble(X)
    assert ensemble.engine == "fold"
    assert not calls
