"""Tensors that a network holds beside parameters and buffers: a write to one in place is a change of every member."""

import copy
import types

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K = 3
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
PLACES = {
    "attribute": (lambda held: held, lambda kept: kept),
    "list": (lambda held: [held], lambda kept: kept[0]),
    "dictionary": (lambda held: {"a": (held,)}, lambda kept: kept["a"][0]),
    "object": (lambda held: types.SimpleNamespace(held=[held]), lambda kept: kept.held[0]),
    "view": (lambda held: [held[1:-1], held], lambda kept: kept[1]),
}
USES = {
    "its values": lambda t: t,
    "a part": lambda t: t[1],
    "a sum": lambda t: t.sum(),
    "a number": lambda t: float(t[0]),
    "a product": lambda t: t @ t,
    "a branch": lambda t: 2.0 if t.sum() > 20 else t[:1],
}


class Holding(nn.Module):
    def __init__(self, place, use, reads):
        super().__init__()
        self.layer, self.use, self.reads, self.place = nn.Linear(4, 4), use, reads, place
        self.kept = PLACES[place][0](torch.tensor([3.0, 1, 2, 4]))

    @property
    def held(self):
        return PLACES[self.place][1](self.kept)

    def forward(self, x):
        h = self.layer(x)
        if self.reads and h.sum() > 1e9:  # each member by its own Python
            return h
        return h * self.use(self.held)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("first", [True, False], ids=["at once", "after a call"])
@pytest.mark.parametrize("way", ["plan", "loop", "gradients"])
@pytest.mark.parametrize(("place", "use"), [*((p, "a sum") for p in PLACES), *(("list", u) for u in USES)])
def test_a_write_is_noticed(place, use, way, first):
    members = [randomised(lambda: Holding(place, USES[use], way == "loop"), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    assert ensemble.engine == "fold"
    with torch.set_grad_enabled(way == "gradients"):
        for factor in (4.0, 2.0, 0.5) if first else (1.0, 4.0, 2.0):
            for module in (ensemble.network, *members) if factor != 1 else ():
                with torch.no_grad():
                    module.held.mul_(factor)
            for _ in range(3):
                expected = torch.stack([member(X) for member in members])
                assert relative_error(ensemble(X), expected.mean(0)) < 1e-5
                assert relative_error(ensemble.member_outputs(X), expected) < 1e-5


class Moving(Holding):
    """Writes to what it holds: each member has its own of that."""

    def forward(self, x):
        h = self.layer(x)
        if self.reads and h.sum() > 1e9:
            return h
        self.held.mul_(0.5).add_(h.detach().mean(0))
        return h * self.use(self.held)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_what_members_write_there_is_their_own_until_the_network_is_written_to(place, reads):
    members = [randomised(lambda: Moving(place, USES["its values"], reads), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    with torch.no_grad():
        for _ in range(5):
            expected = torch.stack([member(X) for member in members]).mean(0)
            assert relative_error(ensemble(X), expected) < 1e-5
