"""What others change inside of values of members that differ in more than weights: done to all of them, or an error."""

import collections
import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastens
from tests.fold.contract import K, made, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def called(ensemble, members):
    near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))


class Differing(nn.Module):
    """A member by a number that is no weight, which writes to a table."""

    def __init__(self, k):
        super().__init__()
        self.layer, self.k, self.table = nn.Linear(4, 4), k, {}

    def forward(self, x):
        """One layer, and what the call before left."""
        y = self.layer(x) * (1 + self.k) + self.table.get("last", 0.0)
        self.table["last"] = y.detach()
        return y


@pytest.mark.parametrize("value", [dict, lambda: collections.defaultdict(float), lambda: {"last": torch.ones(3, 4)}])
def test_a_value_that_is_set_is_each_members_own_where_members_differ(value):
    members = [made(Differing, k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    for _ in range(2):
        for each in (ensemble, *members):
            each.table = value()
        for _ in range(3):
            called(ensemble, members)


class Block(nn.Module):
    """A layer with an attribute and a list."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.scale, self.past = nn.Linear(4, 4), nn.BatchNorm1d(4), 1.0, []

    def forward(self, x):
        """Scaled, and what was added."""
        return self.norm(self.layer(x)) * self.scale + sum(self.past)


class Apart(nn.Module):
    """A member by a number that is no weight, with blocks."""

    def __init__(self, k):
        super().__init__()
        self.block, self.blocks, self.k = Block(), nn.ModuleList([Block()]), k
        self.gain, self.cache = nn.Parameter(torch.ones(4)), [0.5]

    def forward(self, x):
        """Both blocks."""
        return self.blocks[0](self.block(x)) * self.gain * (1 + self.k) + sum(self.cache)


def doubled(x):
    with torch.no_grad():
        x.mul_(2)


INSIDE = {
    "list": lambda m: m.cache.append(2.0),
    "list emptied": lambda m: m.cache.clear(),
    "frozen": lambda m: m.block.requires_grad_(False),
    "one frozen": lambda m: m.block.layer.weight.requires_grad_(False),
    "parameter frozen": lambda m: m.gain.requires_grad_(False),
    "mode": lambda m: m.block.eval(),
    "attribute": lambda m: setattr(m.block, "scale", 2.0),
    "list of a block": lambda m: m.block.past.append(1.5),
    "eps": lambda m: setattr(m.block.norm, "eps", 0.5),
    "block of a list": lambda m: setattr(m.blocks[0], "scale", 3.0),
    "hook": lambda m: m.block.layer.register_forward_hook(lambda module, args, y: 3 * y),
    "hook taken off": lambda m: m.block.layer.register_forward_hook(lambda module, args, y: 3 * y).remove(),
    "module": lambda m: setattr(m.block, "norm", nn.Identity()),
    "frozen and appended": lambda m: (m.block.requires_grad_(False), m.cache.append(1.0)),
    "all weights": lambda m: [doubled(p) for p in m.parameters()],
    "weights, after a look": lambda m: (m.block, m.gain, [doubled(p) for p in m.parameters()]),
}


def apart():
    members = [made(Apart, k) for k in range(K)]
    return fastens.Ensemble(copy.deepcopy(members)), members


def trained_alike(ensemble, members):
    found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
    near(found, expected)
    for each in (ensemble, *members):
        each.zero_grad()
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(ensemble.network.children(), members, strict=True):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert a.requires_grad is b.requires_grad
            assert (a.grad is None) is (b.grad is None)
            if a.grad is not None:
                near(a.grad, b.grad, 1e-4)


@pytest.mark.parametrize("looked", ["at once", "copied", "as members"])
@pytest.mark.parametrize("change", INSIDE)
def test_a_change_inside_of_members_that_differ_is_done_to_all(change, looked):
    ensemble, members = apart()
    for _ in range(2):
        trained_alike(ensemble, members)
        for each in (ensemble, *members):
            INSIDE[change](each)
        if looked == "copied":
            ensemble = copy.deepcopy(ensemble)
        elif looked == "as members":
            ensemble = fastens.Ensemble(list(ensemble.members))
        for _ in range(2):
            trained_alike(ensemble, members)


def written(part, value):
    part.weight.data = value


WEIGHTS = {
    "in place": (lambda m: doubled(m.gain), "gain"),
    "inside": (lambda m: doubled(m.block.layer.weight), "block.layer.weight"),
    "reset": (lambda m: m.block.layer.reset_parameters(), "block.layer.weight"),
    "data": (lambda m: written(m.block.layer, torch.ones(4, 4)), "block.layer.weight"),
    "data of a parameter": (lambda m: m.gain.data.zero_(), "gain"),
    "data in place": (lambda m: m.block.layer.weight.data.zero_(), "block.layer.weight"),
    "an item of data": (lambda m: m.blocks[0].layer.bias.data.__setitem__(0, 5.0), "blocks.0.layer.bias"),
    "data, moved": (lambda m: m.gain.data.copy_(torch.arange(4.0)), "gain"),
    "halves": (lambda m: m.block.half().float(), "block.layer.weight"),
    "array": (lambda m: m.block.layer.bias.detach().numpy().fill(2.0), "block.layer.bias"),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_of_the_first_of_members_that_differ_are_not_changed_alone(change):
    ensemble, members = apart()
    called(ensemble, members)
    change, path = WEIGHTS[change]
    for member in members:
        change(member)
    change(ensemble)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{re.escape(path)} was .*change each of ens\.network\.children\(\)"):
            ensemble(X)
    ensemble.load_state_dict(fastens.Ensemble(members).state_dict())  # all of them, as the remedy says
    called(ensemble, members)


@pytest.mark.parametrize("change", ["data", "data of a parameter", "data in place", "in place", "halves"])
def test_weights_of_members_that_differ_are_changed_one_by_one(change):
    ensemble, members = apart()
    assert ensemble.block is not None
    assert ensemble.gain is not None
    called(ensemble, members)
    for each in (*members, *ensemble.network.children()):
        WEIGHTS[change][0](each)
    for _ in range(2):
        called(ensemble, members)


PUT_ON = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.detach())),
    "buffer": lambda layer: layer.register_buffer("twice", 2 * layer.weight.detach()),
    "module": lambda layer: setattr(layer, "inner", nn.Linear(4, 4)),
    "held": lambda layer: setattr(layer, "held", [layer.weight]),
    "hook": lambda layer: layer.register_forward_hook(functools.partial(hooked, layer)),
}
TAKEN_OFF = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (PUT_ON["pruning"], lambda layer: prune.remove(layer, "weight")),
    "parametrization": (PUT_ON["parametrization"], lambda layer: parametrize.remove_parametrizations(layer, "weight")),
}


def hooked(layer, module, args, y):
    return y + layer.bias


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", PUT_ON)
def test_what_is_made_of_weights_of_the_first_of_members_that_differ_is_not_given_to_others(change):
    ensemble, members = apart()
    called(ensemble, members)
    PUT_ON[change](ensemble.block.layer)
    with pytest.raises(ValueError, match=r"^block\.layer.*change each of ens\.network\.children\(\)"):
        ensemble(X)
    if change in ("orthogonal", "parametrization"):  # which write to the weight as well
        with pytest.raises(ValueError, match=r"^block\.layer"):
            ensemble(X)
    else:
        for _ in range(2):
            called(ensemble, members)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", TAKEN_OFF)
def test_what_computes_weights_of_members_that_differ_is_not_taken_off_the_first_alone(change):
    put_on, taken_off = TAKEN_OFF[change]
    ensemble, members = apart()
    for each in (*members, *ensemble.network.children()):
        torch.manual_seed(0)
        put_on(each.block.layer)
    called(ensemble, members)
    taken_off(ensemble.block.layer)
    with pytest.raises(ValueError, match=r"^block\.layer.*change each of ens\.network\.children\(\)"):
        ensemble(X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", ["list", "list emptied", "frozen", "attribute"])
def test_a_change_inside_of_members_that_differ_reaches_a_compiled_ensemble(change, backend):
    torch.compiler.reset()
    ensemble, members = apart()
    compiled = torch.compile(ensemble, backend=backend, fullgraph=True)
    for _ in range(2):
        near(compiled(X), torch.stack([member(X) for member in members]).mean(0), 1e-5)
        for each in (ensemble, *members):
            INSIDE[change](each)
    near(compiled(X), torch.stack([member(X) for member in members]).mean(0), 1e-5)
    assert [p.requires_grad for p in ensemble.network[1].parameters()] == [
        p.requires_grad for p in members[1].parameters()
    ]
