"""State dicts from before and after members stopped to share a tensor, loaded into ensembles on either side of that."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error


class Averages(nn.Module):
    """Keeps an average of activations in training, equal in all members until then; its first layer is frozen."""

    def __init__(self, seed, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6).requires_grad_(False)
        torch.manual_seed(seed)
        self.last = nn.Linear(6, 5)
        self.register_buffer("average", torch.zeros(6))
        self.other = nn.Linear(5, 6)
        if tied:
            self.other.weight = self.first.weight

    def forward(self, x):
        h = torch.tanh(self.first(x) + self.other(x))
        if self.training:
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.last(h - self.average)


def called(module):
    module(torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))


def unfrozen(module):
    module.requires_grad_()


class Around(nn.Module):
    def __init__(self, ensemble):
        super().__init__()
        self.inner = ensemble


@pytest.mark.parametrize("forward", [True, False], ids=["to_shared", "to_apart"])
@pytest.mark.parametrize("how", ["loaded", "assigned", "inside_another"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [called, unfrozen])
def test_a_state_is_loaded_whatever_is_shared(change, tied, how, forward):
    members = [Averages(seed, tied).double() for seed in range(3)]
    ensemble, other = fastens.Ensemble(copy.deepcopy(members)), fastens.Ensemble(copy.deepcopy(members))
    shapes = {name: x.shape for name, x in ensemble.state_dict().items()}
    for module in (ensemble, *members):
        change(module)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)
    state = copy.deepcopy(ensemble.state_dict())
    assert {name: x.shape for name, x in state.items()} != shapes
    if not forward:
        members = [Averages(seed, tied).double() for seed in range(3)]
        state, other = other.state_dict(), ensemble
    before = {name: x.clone() for name, x in state.items()}
    if how == "inside_another":
        Around(other).load_state_dict({f"inner.{name}": x for name, x in state.items()})
    else:
        other.load_state_dict(state, assign=how == "assigned")
    assert list(state) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    x = torch.randn(4, 5, dtype=torch.float64)
    for mode in (True, False):
        for module in (other, *members):
            module.train(mode)
        expected = torch.stack([member(x) for member in members]).mean(0)
        assert relative_error(other(x), expected) < NETWORK[torch.float64]


def test_what_does_not_fit_is_an_error_still():
    ensemble = fastens.Ensemble([Averages(seed) for seed in range(3)])
    four = fastens.Ensemble([Averages(seed) for seed in range(4)])
    four.requires_grad_()
    with pytest.raises(RuntimeError, match="size mismatch"):
        ensemble.load_state_dict(four.state_dict())


class Loads(nn.Module):
    """Adds to what it loads what is missing there, and looks at shapes, as layers do whose format has changed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.register_buffer("scale", torch.randn(5, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(f"{prefix}scale", self.scale)
        weight = state_dict[f"{prefix}weight"]
        state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return x * self.weight + self.scale


@pytest.mark.parametrize("how", ["loaded", "inside_another"])
@pytest.mark.parametrize("layer", [Loads, lambda: nn.BatchNorm1d(5).double()], ids=["own", "BatchNorm1d"])
def test_modules_that_add_to_what_they_load_add_the_stacks(layer, how):
    """Batch norms add their counter to a dictionary without torch's metadata, such as a file of safetensors."""
    ensemble = fastens.Ensemble([nn.Sequential(nn.Linear(5, 5).double(), layer()) for _ in range(3)]).eval()
    state = {name: 0.5 * p.detach() for name, p in ensemble.named_parameters()}
    if how == "inside_another":
        Around(ensemble).load_state_dict({f"inner.{name}": x for name, x in state.items()}, strict=False)
    else:
        ensemble.load_state_dict(state, strict=False)
    assert all(torch.equal(p, state[name]) for name, p in ensemble.named_parameters())
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.stack([member(x) for member in ensemble.members]).mean(0)
    assert relative_error(ensemble(x), expected) < NETWORK[torch.float64]
