"""A first call that is repeated in float32, or on drawn weights, of networks that write to what all members share."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import near


class Counts(nn.Module):
    """Counts its calls in a buffer, in place or by another one, and answers by it."""

    def __init__(self, seed, in_place):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.in_place = nn.Linear(5, 6), nn.Linear(6, 5), in_place
        self.register_buffer("calls", torch.zeros(6))

    def forward(self, x):
        if self.in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return self.last(torch.tanh(self.first(x)) + 0.5 * self.calls)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "zeros"])
def test_members_do_not_see_what_the_others_wrote(kind, called, in_place):
    members = [Counts(seed, in_place).eval() for seed in range(3)]
    if kind == "zeros":
        for member in members:
            nn.init.zeros_(member.last.weight)
    if kind == "bfloat16":
        for member in members:
            member.bfloat16()
    ensemble, x = fastens.Ensemble(copy.deepcopy(members)), torch.randn(4, 5).to(members[0].first.weight.dtype)
    with torch.no_grad():
        for scope in ([nullcontext()] if called else []) + [
            torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast") for _ in range(2)
        ]:
            with scope:
                expected = torch.stack([member(x) for member in members]).float().mean(0)
                near(ensemble(x).float(), expected, 1e-6 if kind == "zeros" else 2e-2)
    assert ensemble.engine == "fold"
