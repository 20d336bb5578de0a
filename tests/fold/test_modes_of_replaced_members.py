"""Members that are replaced where members differ, or after calls in inference mode: modes and buffers stay theirs."""

import copy

import pytest
import torch
from torch import nn

import fastens


class Frozen(nn.Module):
    """Has a part that stays in evaluation mode, and keeps a product of its weights until its mode is set."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4))
        self.product = None

    def train(self, mode=True):
        self.product = None
        return super().train(mode)

    def forward(self, x):
        if self.product is None:
            self.product = self.inner[2].weight.detach().sum()
        return self.inner(x) * self.product


@pytest.mark.parametrize("form", ["module", "state_dict"])
def test_parts_keep_their_modes(form):
    members = [Frozen(5), Frozen(6)]
    for member in members:
        member.inner[1].eval()
    with pytest.warns(UserWarning, match="one by one"):
        ens = fastens.Ensemble(members)
    x, oracle = torch.randn(3, 4), copy.deepcopy(members)
    torch.testing.assert_close(ens.member_outputs(x), torch.stack([member(x) for member in oracle]))
    other = copy.deepcopy(oracle[1])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    if form == "module":
        ens.replace_member(1, other)
        oracle[1] = other
    else:
        ens.replace_member(1, other.state_dict())
        oracle[1].load_state_dict(other.state_dict())
    for _ in range(3):
        torch.testing.assert_close(ens.member_outputs(x), torch.stack([member(x) for member in oracle]))


class Averaging(nn.Module):
    """Puts another buffer in the place of its own in every call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        h = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


def test_buffers_of_inference_mode_are_replaced():
    members, x = [Averaging() for _ in range(3)], torch.randn(3, 4)
    ens, oracle, other = fastens.Ensemble(members), copy.deepcopy(members), Averaging()
    with torch.inference_mode():
        for member in (ens, *oracle):
            member(x)
    ens.replace_member(1, other)
    oracle[1] = copy.deepcopy(other)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(ens.member_outputs(x), torch.stack([member(x) for member in oracle]))
