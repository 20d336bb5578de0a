"""Hooks on what autograd saves, which get a member's tensors as in the loop over members."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import fastens
from fastens.training import member_forward
from tests.networks import randomised


def quantised(x):
    """As seven steps of the largest entry of a whole tensor."""
    size = x.abs().max() / 7 + 1e-9
    return (x / size).round() * size if x.is_floating_point() else x


def quantising():
    return saved_tensors_hooks(quantised, lambda x: x)


class Inside(nn.Module):
    def __init__(self, hooks):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.hooks = hooks

    def forward(self, x):
        with self.hooks():
            h = torch.tanh(self.norm(self.first(x)))
        return self.last(h)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize(
    ("around", "inside", "engine"),
    [
        (quantising, contextlib.nullcontext, "fold"),  # for as long as the hooks are there, one by one
        (contextlib.nullcontext, quantising, "loop"),
        (save_on_cpu, contextlib.nullcontext, "fold"),
        (contextlib.nullcontext, save_on_cpu, "fold"),
    ],
)
@pytest.mark.parametrize("way", ["own rows", "rule", "drawn"])
def test_gradients_are_the_members(way, around, inside, engine):
    members = [randomised(lambda: Inside(inside), seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members)
    members = [copy.deepcopy(member) for member in members]
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 25.0]).view(3, 1, 1)
    for _ in range(2):  # the first call of a kind, and one that is known
        ensemble.zero_grad()
        with around():
            if way == "own rows":
                outputs = member_forward(ensemble, x)
            elif way == "rule":
                outputs = ensemble(x[0])
            else:
                with ensemble.assigned([0, 1, 2, 0]):
                    outputs = ensemble(x[0])
        outputs.square().sum().backward()
    with around():
        theirs = [member(x[k] if way == "own rows" else x[0]) for k, member in enumerate(members)]
        if way == "rule":
            theirs = [torch.stack(theirs).mean(0)]
        elif way == "drawn":
            theirs = [torch.stack([theirs[k][row] for row, k in enumerate([0, 1, 2, 0])])]
    sum(each.square().sum() for each in theirs).backward()
    assert ensemble.engine == engine
    for name, p in ensemble.network.named_parameters():
        expected = torch.stack([dict(member.named_parameters())[name].grad for member in members])
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name)
