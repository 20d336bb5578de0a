"""Functions that members make of themselves when they are called, and keep."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, K, made, near

KINDS = {
    "closure": lambda member: lambda x: member.scaled(x),
    "closure over a layer": lambda member: (lambda layer: lambda x: layer(x))(member.layer),
    "default": lambda member: lambda x, layer=member.layer: layer(x),
    "method": lambda member: member.scaled,
    "partial": lambda member: functools.partial(Keeping.scaled, member),
    "in a dictionary": lambda member: {"of it": member.scaled}["of it"],
    "object": lambda member: Caller(member),
}
FOLDED = ["method", "partial", "in a dictionary", "object"]  # of which a copy of a member has one of its own


class Caller:
    """An object that knows its member."""

    def __init__(self, member):
        self.member = member

    def __call__(self, x):
        return self.member.scaled(x)


class Keeping(nn.Module):
    """Makes a function of itself in its first call, or in a later one."""

    def __init__(self, kind, at=1):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        self.kind, self.at, self.scale, self.options, self.calls, self.kept = kind, at, 1.0, {"shift": 0.0}, 0, None

    def scaled(self, x):
        return self.layer(x) * self.scale + self.options["shift"]

    def forward(self, x):
        self.calls += 1
        if self.kept is None and self.calls >= self.at:
            self.kept = KINDS[self.kind](self)
        return self.last(x if self.kept is None else self.kept(x)) + self.calls


def doubled(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


CHANGES = {
    "scale": lambda module: setattr(module, "scale", module.scale * 2),
    "weights": doubled,
    "options": lambda module: setattr(module, "options", {"shift": 3.0}),
    "a module more": lambda module: module.last.append(nn.Tanh()),
    "scale again": lambda module: setattr(module, "scale", module.scale * 2),
    "forgotten": lambda module: setattr(module, "kept", None),
    "frozen": lambda module: module.requires_grad_(False),
    "scale and options": lambda module: (setattr(module, "scale", 0.5), setattr(module, "options", {"shift": 1.0})),
}


def compared(held, x):
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            near(held.quietly(lambda: held.ensemble(x)), torch.stack([member(x) for member in held.members]).mean(0))


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_follows_every_change(kind, engine):
    held = Held(lambda k: Keeping(kind), engine=engine)
    compared(held, torch.randn(5, 4))
    assert held.ensemble.engine == ("fold" if engine == "auto" and kind in FOLDED else "loop")
    for change in CHANGES.values():
        held.each(change)
        compared(held, torch.randn(5, 4))


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", FOLDED)
def test_a_copy_trains_its_own_weights(kind, way, engine):
    held = Held(lambda k: Keeping(kind), engine=engine)
    compared(held, x := torch.randn(5, 4))
    before, held.ensemble = held.ensemble, way(held.ensemble)
    held.members = [copy.deepcopy(member) for member in held.members]
    held.each(doubled)
    held.each(CHANGES["scale"])
    compared(held, x)
    held.ensemble(x).sum().backward()
    torch.stack([member(x) for member in held.members]).mean(0).sum().backward()
    assert all(p.grad is None for p in before.parameters())
    for name, stack in held.ensemble.network.named_parameters():
        near(stack.grad, torch.stack([member.get_parameter(name).grad for member in held.members]))


@pytest.mark.parametrize("kind", FOLDED)
def test_a_member_that_is_taken_out_is_on_its_own(kind):
    ensemble = fastens.Ensemble([made(lambda k: Keeping(kind), k) for k in range(K)], engine="loop")
    ensemble(x := torch.randn(5, 4))
    member = ensemble.members[1]
    expected = member(x)
    doubled(ensemble)
    member.calls -= 1
    near(member(x), expected)


@pytest.mark.parametrize("kind", ["closure", "closure over a layer", "default"])
def test_closures_that_a_later_call_makes(kind):
    """The fold takes them; members one by one would share them."""
    held = Held(lambda k: Keeping(kind, at=3))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(5, 4)
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0))
        assert held.ensemble.engine == "fold"
        with pytest.raises(ValueError, match="kept reaches a part of the ensemble's network by a closure"):
            held.ensemble(torch.randn(3, 5, 4))
