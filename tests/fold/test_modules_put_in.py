"""A module that is put into an ensemble's network later is part of it: what is written to it reaches all members."""

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4)).eval()


KINDS = {
    "members": lambda engine: fastens.Ensemble([network() for _ in range(3)], engine=engine),
    "masks": lambda engine: fastens.MCDropout(network(), 3, engine=engine),
}


@torch.no_grad()
def in_place(layer):
    layer.weight.mul_(2)


def by_data(layer):
    layer.weight.data = layer.weight.data * 2


def loaded(layer):
    layer.load_state_dict({name: 2 * x for name, x in layer.state_dict().items()})


def loaded_by_assigning(layer):
    layer.load_state_dict({name: 2 * x for name, x in layer.state_dict().items()}, assign=True)


def replaced(layer):
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def stepped(layer):
    layer.weight.grad = -layer.weight.detach()
    torch.optim.SGD([layer.weight], 1.0, fused=True).step()


WRITES = (in_place, by_data, loaded, loaded_by_assigning, replaced, stepped)


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_it_reaches_all_members(write, kind, engine):
    ensemble, x, layer = KINDS[kind](engine), torch.randn(2, 4), nn.Linear(4, 4)
    with torch.no_grad():
        ensemble(x)
    ensemble.network[2] = layer
    for _ in range(2):
        with torch.no_grad():
            hidden = torch.stack([member(x) for member in ensemble.members])
            assert relative_error(ensemble.member_outputs(x), hidden) < NETWORK[torch.float32]
            before = ensemble(x)
        write(layer)
        with torch.no_grad():
            found = ensemble(x)
            assert ensemble.verify(x) < NETWORK[torch.float32]
            expected = torch.stack([member(x) for member in ensemble.members]).mean(0)
        assert relative_error(found, expected) < NETWORK[torch.float32]
        assert relative_error(found, before) > 1e-2


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_it(kind, engine):
    ensemble, x, layer = KINDS[kind](engine), torch.randn(2, 4), nn.Linear(4, 4)
    ensemble.network[2] = layer
    ensemble(x).sum().backward()
    assert relative_error(layer.bias.grad, torch.full((4,), 2.0)) < 1e-6


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_each_member_keeps_statistics_of_its_own(engine):
    torch.manual_seed(0)
    first = [nn.Linear(4, 4) for _ in range(3)]
    ensemble = fastens.Ensemble([nn.Sequential(each, nn.Identity()) for each in first], engine=engine)
    setattr(ensemble.network, "1", nn.BatchNorm1d(4))
    ensemble.train()
    x = torch.randn(5, 4)
    with torch.no_grad():
        ensemble(x)
        for member, linear in zip(ensemble.members, first, strict=True):
            assert relative_error(member.get_buffer("1.running_mean"), 0.1 * linear(x).mean(0)) < 1e-5
