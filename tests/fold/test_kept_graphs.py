"""Networks that keep what a call with gradients gave: their members are handed out, replaced and saved."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import K


class Keeping(nn.Module):
    """Keeps an activation, as code does that shows features afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept, self.features = None, {}

    def forward(self, x):
        self.kept = self.features["first"] = self.first(x)
        return self.second(torch.tanh(self.kept))


@pytest.fixture
def called():
    members, x = [Keeping() for _ in range(K)], torch.randn(2, 4)
    ens = fastens.Ensemble(members)
    ens(x).sum().backward()
    return ens, members, x


def test_members_are_handed_out(called):
    ens, members, x = called
    for k in range(K):
        members[k](x)
        member = ens.members[k]
        torch.testing.assert_close(member.kept, members[k].kept)
        assert member.kept is member.features["first"]
        assert member.kept.is_leaf
        torch.testing.assert_close(member(x), members[k](x))


@pytest.mark.parametrize("form", ["module", "state_dict"])
def test_members_are_replaced(called, form):
    ens, members, x = called
    members[1] = Keeping()
    ens.replace_member(1, ens.members[1] if form == "module" else members[1].state_dict())
    if form == "state_dict":
        torch.testing.assert_close(ens.member_outputs(x), torch.stack([member(x) for member in members]))


def test_copies_and_files(called, tmp_path):
    ens, members, x = called
    wanted = torch.stack([member(x) for member in members])
    torch.testing.assert_close(copy.deepcopy(ens).member_outputs(x), wanted)
    ens.save_pretrained(tmp_path)
    loaded = fastens.Ensemble.from_pretrained(tmp_path, factory=Keeping)
    torch.testing.assert_close(loaded.member_outputs(x), wanted)
    assert ens.network.kept.requires_grad  # what the network keeps stays as it is
