"""Members that hold on to their weights when they are called: in attributes, in containers, or as recurrent layers."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error


class Keeps(nn.Module):
    """A linear layer between others, by a weight that ``keep`` puts somewhere when it is called."""

    def __init__(self, keep, find):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.keep, self.find, self.kept = keep, find, None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.keep(self.inner.weight)
        return self.last(torch.tanh(F.linear(x, self.find(self.kept))))


class Recurrent(nn.Module):
    """A recurrent layer, which lists its weights for itself."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 4)

    def forward(self, x):
        return self.layer(x)[0]


def listed(w):
    return [w]


def of_list(kept):
    return kept[0]


def nested(w):
    return {"weights": (w,)}


def of_nested(kept):
    return kept["weights"][0]


def partial(w):
    return functools.partial(torch.mm, w)


def of_partial(kept):
    return kept.args[0]


KEPT = {"list": (listed, of_list), "nested": (nested, of_nested), "partial": (partial, of_partial)}


def halved(modules):
    """As conversions do: the same parameters in other memory."""
    for module in modules:
        for p in module.parameters():
            p.data = p.data * 0.5
    return modules


ROUTES = {
    "double": lambda modules: [m.double() for m in modules],
    "bfloat16 and back": lambda modules: [m.bfloat16().float() for m in modules],
    "format": lambda modules: [m.to(memory_format=torch.channels_last) for m in modules],
    "data": halved,
    "deepcopy": copy.deepcopy,
    "pickle": lambda modules: pickle.loads(pickle.dumps(modules)),
}


def scaled(modules):
    """Another value in the same memory, as an optimizer writes it."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.mul_(1.5)


NETWORKS = {
    **{name: functools.partial(Keeps, *KEPT[name]) for name in KEPT},
    **{kind.__name__: functools.partial(Recurrent, kind) for kind in (nn.GRU, nn.LSTM, nn.RNN)},
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("route", ROUTES)
@torch.no_grad()
def test_a_weight_that_is_held_elsewhere_is_the_member_s(network, route, engine):
    torch.manual_seed(0)
    members = [NETWORKS[network]().eval() for _ in range(3)]
    x = torch.randn(2, 4)
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    if network in KEPT and engine == "loop":
        for _ in range(2):
            with pytest.raises(ValueError, match=r"a member keeps inner\.weight in an attribute when it is called"):
                ensemble(x)
        return
    for _ in range(2):
        torch.testing.assert_close(ensemble(x), torch.stack([m(x) for m in members]).mean(0))
    members = ROUTES[route](members)
    (ensemble,) = ROUTES[route]([ensemble])
    x = x.to(next(members[0].parameters()).dtype)
    for _ in range(2):
        scaled([*members, ensemble])
        for _ in range(3):
            expected = torch.stack([m(x) for m in members]).mean(0)
            assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@torch.no_grad()
def test_a_recurrent_layer_is_folded_after_a_conversion(kind):
    ensemble = fastens.Ensemble([Recurrent(kind) for _ in range(2)])
    ensemble(torch.randn(2, 4))
    ensemble.double()(torch.randn(2, 4).double())
    assert ensemble.engine == "fold"
    assert not ensemble.report().looped
