"""Parameters that members share until they come apart stay the objects that an optimizer holds."""

import copy

import pytest
import torch
from torch import nn, optim

import fastens
from fastens.training import training_step
from tests.networks import randomised


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.head(self.body(x))
        return h if len(x) < 5 else h * bool(h.sum() > 0)  # which no fold answers


WAYS = {  # by which members come to have their own of what they shared
    "unfrozen": lambda ensemble: None,
    "looped": lambda ensemble: ensemble(torch.ones(6, 4)),
    "replaced": lambda ensemble: ensemble.replace_member(0, ensemble.members[1].requires_grad_(False).apply(_moved)),
    "loaded": lambda ensemble: ensemble.load_state_dict(
        {n: x.expand(3, *x.shape) * 1.5 if "body" in n else x for n, x in ensemble.state_dict().items()}
    ),
}


def _moved(module):
    for p in module.parameters(recurse=False):
        p.data += 0.5


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_made_before_trains_what_members_had_in_common(way):
    base = randomised(Branching, 0)
    members = [copy.deepcopy(base) for _ in range(3)]
    for k, member in enumerate(members):
        member.body.requires_grad_(False)
        randomised(lambda member=member: member.head, k)
    ensemble = fastens.Ensemble(members).train()
    optimizer = optim.SGD(ensemble.parameters(), 0.1)
    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    training_step(ensemble, optimizer, lambda y: y.square(), x)
    held = {name: p for name, p in ensemble.named_parameters()}
    assert held["network.body.weight"].shape == (4, 4)
    WAYS[way](ensemble)
    ensemble.requires_grad_(True)
    assert {name: p for name, p in ensemble.named_parameters()} == held
    assert held["network.body.weight"].shape == (3, 4, 4)
    twins = list(ensemble.members)
    training_step(ensemble, optimizer, lambda y: y.square(), x)
    for k, twin in enumerate(twins):
        twin(x[k]).square().mean().backward()
        for (name, p), ours in zip(twin.named_parameters(), ensemble.members[k].parameters(), strict=True):
            torch.testing.assert_close(ours, p.detach() - 0.1 * p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_parameter_that_a_graph_holds_is_another_and_is_named():
    base = randomised(Branching, 0)
    members = [copy.deepcopy(base) for _ in range(2)]
    for k, member in enumerate(members):
        member.body.requires_grad_(False)
        randomised(lambda member=member: member.head, k)
    ensemble = fastens.Ensemble(members)
    ours, theirs = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    output = ensemble(ours)
    with pytest.warns(UserWarning, match=r"weight \[4, 4\] is another parameter from now on"):
        ensemble.requires_grad_(True)
    output.sum().backward()
    torch.stack([member(theirs) for member in members]).mean(0).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


class Listing(nn.Module):
    """Has a weight under two names, and in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.bias = self.first.bias
        self.all = [self.first.weight, self.second.weight]

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.all[0].sum()


@pytest.mark.parametrize("engine", ["fold", "loop", "modules"])
def test_an_optimizer_made_before_trains_a_member_that_was_put_in(engine):
    members = [randomised(Listing, seed) for seed in range(3)]
    if engine == "modules":
        members[2].other = nn.Linear(1, 1)
    ensemble = fastens.Ensemble(members, engine="fold" if engine == "fold" else "loop").train()
    optimizer = optim.SGD(ensemble.parameters(), 0.01)
    held, other = list(ensemble.parameters()), randomised(Listing, 9)
    values = [p.detach().clone() for p in other.parameters()]
    ensemble.replace_member(1, other)
    assert all(a is b for a, b in zip(ensemble.parameters(), held, strict=True))
    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    training_step(ensemble, optimizer, lambda y: y.square(), x)
    assert all(map(torch.equal, other.parameters(), values))  # what was put in is a copy
    other(x[1]).square().mean().backward()
    for ours, p in zip(ensemble.members[1].parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, p.detach() - 0.01 * p.grad, rtol=1e-4, atol=1e-6)


class Growing(nn.Module):
    """Gets a layer more where its weights say so, and another last layer where it is asked for."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), None, nn.Linear(4, 4)

    def grow(self):
        if self.first.weight[0, 0] > 0:
            self.second = nn.Linear(4, 4)

    def widen(self):
        self.last = nn.Linear(4, 5 + (self.first.weight[0, 0] > 5))

    def forward(self, x):
        h = self.first(x)
        return self.last(h if self.second is None else self.second(h))


def growing():
    members = [randomised(Growing, seed) for seed in range(3)]
    for k, member in enumerate(members):
        member.first.weight.data[0, 0] = 1.0 - k
    return fastens.Ensemble(members).train()


def step(ensemble, optimizer):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ensemble.member_outputs(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
def test_an_optimizer_of_members_that_came_apart_says_so():
    """Its steps trained what no member has."""
    ensemble = growing()
    optimizer, other = optim.Adam(ensemble.parameters()), optim.Adam(randomised(Growing, 5).parameters())
    step(ensemble, optimizer)
    ensemble.grow()
    assert ensemble.engine == "loop"
    with pytest.raises(RuntimeError, match=r"first\.weight \[3, 4, 4\] .* Make the optimizer anew"):
        step(ensemble, optimizer)
    other.step()
    held, before = ensemble.network[0].first.weight, ensemble.network[0].first.weight.detach().clone()
    step(ensemble, optim.Adam(ensemble.parameters()))
    assert not torch.equal(held, before)


def test_an_optimizer_goes_on_beside_a_layer_that_members_replaced():
    """It would with a network alone, which has that layer no more either."""
    ensemble = growing()
    optimizer = optim.Adam(ensemble.parameters())
    step(ensemble, optimizer)
    ensemble.widen()
    before = next(ensemble.parameters()).detach().clone()
    step(ensemble, optimizer)
    assert not torch.equal(next(ensemble.parameters()), before)
