"""Members whose parameters and buffers are of classes of their own, and copies of parametrized members."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastens

K = 3


class Scaled(nn.Parameter):
    """A parameter that knows its scale."""

    scale = 2.0


class Marked(torch.Tensor):
    """A tensor that code knows by its class."""


class Reading(nn.Module):
    """Does one thing with weights of a class, and another with those of torch."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if kind is Scaled:
            self.first.weight = Scaled(torch.randn(4, 4))
        self.register_buffer("mark", torch.randn(4).as_subclass(Marked) if kind is Marked else None)

    def forward(self, x):
        if isinstance(self.first.weight, Scaled):
            x = self.first(x) * self.first.weight.scale
        if isinstance(self.mark, Marked):
            x = (x + self.mark).as_subclass(torch.Tensor)
        return self.second(x)


def outputs(members, x):
    return torch.stack([member(x) for member in members])


@pytest.mark.parametrize("kind", [Scaled, Marked])
def test_weights_keep_their_class(kind):
    """Stacks are plain tensors, of which code that asks for the class would take another way."""
    members = [Reading(kind).requires_grad_(kind is Marked) for _ in range(K)]
    with pytest.warns(UserWarning, match=f"is a {kind.__name__}, a class of its own"):
        ens = fastens.Ensemble(members)
    x = torch.randn(2, 4)
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(ens.member_outputs(x), outputs(members, x))
            torch.testing.assert_close(ens.members[1](x), members[1](x))
    if kind is Scaled:  # the other is none that Python can copy
        torch.testing.assert_close(copy.deepcopy(ens).member_outputs(x), outputs(members, x))
    torch.testing.assert_close(
        ens.double().member_outputs(x.double()), outputs([m.double() for m in members], x.double())
    )
    with pytest.raises(ValueError, match="a class of its own"):
        fastens.MCDropout(members[0], 2)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_deep_copies_of_parametrized_members_fold(kind):
    """The class of a copy holds the original, which is none of the copy's values."""
    made = [nn.Sequential(getattr(parametrizations, kind)(nn.Linear(4, 4)), nn.Tanh()).eval() for _ in range(K)]
    members = [copy.deepcopy(member) for member in made]
    with torch.no_grad():
        for member in members:
            member[0].bias.add_(torch.randn(4))
    ens = fastens.Ensemble(members)
    assert ens.engine == "fold"
    x = torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(ens.member_outputs(x), outputs(members, x))
