"""Members that draw by a seed or a generator that they choose: each draws what it would draw alone."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error


def by_generator(x):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


def by_generator_in_place(x):
    return x + torch.empty_like(x).uniform_(generator=torch.Generator().manual_seed(3))


def by_permutation(x):
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))]


def by_seed(x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return x + torch.randn_like(x)


def by_seed_for_good(x):
    torch.manual_seed(3)
    return x + torch.rand(x.shape)


def by_the_seed_of_the_process(x):
    torch.manual_seed(11)
    y = nn.functional.dropout(x, 0.5, True)
    torch.manual_seed(11)
    return y + torch.bernoulli(torch.full_like(x, 0.5))


DRAWS = (by_generator, by_generator_in_place, by_permutation, by_seed, by_seed_for_good, by_the_seed_of_the_process)


class Drawing(nn.Module):
    def __init__(self, draws):
        super().__init__()
        self.layer, self.draws = nn.Linear(6, 6), draws

    def forward(self, x):
        return self.layer(self.draws(x) if float(x[0, 0]) > 0 else x)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("draws", DRAWS)
def test_members_draw_the_same_numbers(draws, late):
    torch.manual_seed(11)
    members = [Drawing(draws) for _ in range(3)]
    ensemble, members = fastens.Ensemble(members), copy.deepcopy(members)
    for first in ([-1.0, -1.0] if late else []) + [1.0, 1.0]:
        x = torch.randn(2, 6)
        x[0, 0] = first
        with torch.no_grad():
            expected = torch.stack([member(x) for member in members])
            assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]


@pytest.mark.parametrize("first", [0.5, 0.0])
def test_a_seed_that_was_set_before_the_call_is_none_of_the_networks(first):
    """Also where several dropouts draw after it, and where the first of them draw nothing."""
    dropouts = nn.Dropout(first), nn.Dropout(first), nn.Dropout(0.5)
    network = nn.Sequential(dropouts[0], nn.Linear(6, 6), *dropouts[1:]).train()
    ensemble = fastens.Ensemble([copy.deepcopy(network) for _ in range(2)], engine="fold")
    for _ in range(3):
        torch.manual_seed(0)
        outputs = ensemble.member_outputs(torch.ones(4, 6))
        assert not torch.equal(outputs[0], outputs[1])
    assert ensemble.engine == "fold"
