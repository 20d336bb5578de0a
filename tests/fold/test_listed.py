"""Members whose own code lists their parameters and buffers, behind a branch that the first call does not take."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error


def norms(self):
    return sum(p.norm() for p in self.parameters())


def names(self):
    return sum(i * p.sum() for i, (_, p) in enumerate(self.named_parameters()))


def state(self):
    return sum(x.sum() for x in self.state_dict().values())


def buffers(self):
    return sum(x.square().sum() for x in self.buffers())


def vector(self):
    return nn.utils.parameters_to_vector(self.parameters()).norm()


def table(self):
    return sum(p.norm() for p in self.first._parameters.values())


def count(self):
    return len(list(self.parameters())) + (self.first.weight is self.second.weight)


def like_the_first(self):
    p = next(self.parameters())
    return torch.ones_like(p).sum() + p.new_ones(p.shape[0]).sum() + p.ndim


LISTS = (norms, names, state, buffers, vector, table, count, like_the_first)


class Listing(nn.Module):
    def __init__(self, lists, tied):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight
        self.register_buffer("scale", torch.randn(4))
        self.lists = lists

    def forward(self, x):
        y = self.second(self.first(x) * self.scale)
        return y + self.lists(self) if float(x[0, 0]) > 0 else y


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lists", LISTS)
def test_members_list_their_own_tensors(lists, tied, engine):
    torch.manual_seed(0)
    members = [Listing(lists, tied) for _ in range(3)]
    ensemble, members = fastens.Ensemble(members, engine=engine), copy.deepcopy(members)
    for first in (-1.0, -1.0, 1.0, 1.0):
        for enabled in (False, True):
            x = torch.randn(2, 4)
            x[0, 0] = first
            with torch.set_grad_enabled(enabled):
                expected = torch.stack([member(x) for member in members])
                assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
    assert ensemble.engine == engine
    assert sum(p.numel() for p in ensemble.parameters()) == sum(p.numel() for m in members for p in m.parameters())


def test_a_network_that_asks_itself_to_be_where_it_is_stays_folded():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.to(x.device).frozen.requires_grad_(False)
            return self.frozen(self.layer(x))

    members = [Moving() for _ in range(3)]
    ensemble, x = fastens.Ensemble(copy.deepcopy(members), engine="fold"), torch.randn(2, 4)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members]).mean(0)
        assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]
    assert ensemble.engine == "fold"
    assert not dict(ensemble.network.named_parameters())["frozen.weight"].requires_grad
