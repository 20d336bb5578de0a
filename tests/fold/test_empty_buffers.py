"""Buffers that calls fill or let grow, and that others empty."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import K


class Filling(nn.Module):
    """Fills a buffer in its first call, with what its weights make of the input or with what is the same for all."""

    def __init__(self, common=False):
        super().__init__()
        self.first, self.second, self.common = nn.Linear(4, 4), nn.Linear(4, 4), common
        self.register_buffer("mean", None)
        self.register_buffer("other", None, persistent=False)

    def forward(self, x):
        h = self.first(x)
        if self.mean is None:
            self.mean = torch.arange(4.0) if self.common else h.detach().mean(0)
        return self.second(h - self.mean)


@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_each_member_fills_its_own(engine, common, grad):
    members = [Filling(common) for _ in range(K)]
    oracle = copy.deepcopy(members)
    ens = fastens.Ensemble(members, engine=engine)
    with torch.set_grad_enabled(grad):
        for call in range(8):
            if call == 5:  # it is filled anew
                ens.mean = None
                for member in oracle:
                    member.mean = None
            x = torch.randn(3, 4)
            wanted = torch.stack([member(x) for member in oracle])
            torch.testing.assert_close(ens.member_outputs(x), wanted, rtol=1e-4, atol=1e-5)
    assert all(member.mean is None for member in members)  # those that were handed in are left as they are
    for k in range(K):
        torch.testing.assert_close(ens.members[k].mean, oracle[k].mean)
    torch.testing.assert_close(copy.deepcopy(ens).member_outputs(x), wanted, rtol=1e-4, atol=1e-5)


class Growing(nn.Module):
    """Keeps all that it has seen in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, x):
        h = self.layer(x)
        self.seen = torch.cat([self.seen, h.detach()])
        return h - self.seen.mean(0)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_buffers_that_grew_can_be_emptied(engine):
    members = [Growing() for _ in range(K)]
    oracle = copy.deepcopy(members)
    ens = fastens.Ensemble(members, engine=engine)
    with torch.no_grad():
        for call in range(6):
            if call % 2:
                for network in (ens, *oracle):
                    network.seen = torch.zeros(0, 4)
            x = torch.randn(3, 4)
            wanted = torch.stack([member(x) for member in oracle])
            torch.testing.assert_close(ens.member_outputs(x), wanted, rtol=1e-4, atol=1e-5)


def test_what_has_no_stack_is_named_where_a_member_is_replaced():
    members, x = [Filling() for _ in range(K)], torch.randn(2, 4)
    ens = fastens.Ensemble(members, engine="loop")
    for network in (ens, members[0]):
        network(x)
    with pytest.raises(ValueError, match="member 1: mean is a tensor that calls made"):
        ens.replace_member(1, members[0])


def test_a_first_call_leaves_members_as_they_are():
    members = [Filling() for _ in range(K)]
    ens, x = fastens.Ensemble(members), torch.randn(2, 4)
    ens(x)
    assert list(ens.network._buffers) == ["mean", "other"]
    assert all(member.mean is None for member in members)
