"""The write barrier: whatever is written to a network, by whatever method, plans are of the network as it is."""

import abc
import types
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn

from fastens import _native
from fastens.network.barrier import HOOKS, Barrier, watch
from tests.fold.test_guards import Net, X, by_members, planned
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Tanh()})
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.chain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        for module in (*self.named.values(), *self.listed, self.chain):
            x = module(x)
        return x


@pytest.mark.parametrize("change", {
    "set": lambda net: net.named.__setitem__("a", nn.Linear(4, 4)),
    "update": lambda net: net.named.update({"c": nn.Linear(4, 4)}),
    "pop": lambda net: net.named.pop("b"),
    "clear": lambda net: net.named.clear(),
    "insert": lambda net: net.listed.insert(0, nn.Linear(4, 4)),
    "append": lambda net: net.listed.append(nn.Linear(4, 4)),
    "delete": lambda net: net.listed.__delitem__(1),
    "append to a chain": lambda net: net.chain.append(nn.Linear(4, 4)),
    "insert into a chain": lambda net: net.chain.insert(1, nn.Linear(4, 4)),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_containers_are_noticed(change):
    ensemble = planned(Containers)
    old = by_members(ensemble)
    change[1](ensemble.network)
    expected = by_members(ensemble)
    assert relative_error(old, expected) > 1e-3
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(ensemble(X), expected) < 1e-5


class NoAttributes:
    __slots__ = ()


class SetsItself:
    def __setattr__(self, name, value):
        super().__setattr__(name, 2 * value if name == "doubled" else value)


BASES = {
    "abstract": (abc.ABC, nn.Module),
    "generic": (Generic[TypeVar("T")], nn.Module),
    "slots": (NoAttributes, nn.Module),
    "sets itself": (SetsItself, nn.Module),
    "abstract last": (nn.Module, abc.ABC),
}


@pytest.mark.parametrize("bases", BASES.values(), ids=BASES)
def test_a_module_may_have_any_bases(bases):
    def fill(body):
        body["__init__"] = lambda self: (nn.Module.__init__(self), setattr(self, "doubled", 1.0), None)[-1]
        body["forward"] = lambda self, x: x * self.doubled

    kind = types.new_class("Mixed", bases, exec_body=fill)
    ensemble = planned(lambda: nn.Sequential(nn.Linear(4, 4), kind()))
    old = by_members(ensemble)
    ensemble.network[1].doubled = 3.0
    expected = by_members(ensemble)
    assert type(ensemble.members[0][1]) is kind
    assert relative_error(old, expected) > 1e-3
    with torch.no_grad():
        assert relative_error(ensemble(X), expected) < 1e-5


def test_a_write_is_counted_when_it_is_done():
    """Who looks while another thread writes does not take the old network for the new one."""
    looks = []

    class Slow(nn.LayerNorm):
        def __setattr__(self, name, value):
            for look in looks:
                look()
            super().__setattr__(name, value)

    class Net(Containers):
        def __init__(self):
            super().__init__()
            self.chain.append(Slow(4))

    ensemble = planned(Net)
    guards, seen = ensemble._engine.plans.guards, []
    looks.append(lambda: seen.append(guards.state()))
    ensemble.network.chain[2].eps = 1.0
    assert len(seen) == 1
    assert guards.state() != seen[0]


@pytest.mark.parametrize("insert", ["register", "setdefault", "update"])
def test_hooks_are_noticed_however_they_come(insert):
    ensemble = planned()
    hooks, calls = ensemble.network.second._forward_hooks, []

    def hook(module, inputs, output):
        calls.append(1)
        return 2 * output

    for _ in range(2):
        if insert == "register":
            ensemble.network.second.register_forward_hook(hook)
        elif insert == "setdefault":
            hooks.setdefault(-1, hook)
        else:
            hooks.update({-1: hook})
        with torch.no_grad():
            expected, doubled = by_members(ensemble), ensemble(X)
        assert calls
        assert relative_error(doubled, expected) < 1e-5
        hooks.clear()
        with torch.no_grad():
            plain = ensemble(X)
        assert relative_error(plain, by_members(ensemble)) < 1e-5
        assert relative_error(plain, doubled) > 1e-2
        calls.clear()
    assert len(ensemble.report().plans) == 1  # it is as true as before


REPEATED = {
    "a mode": lambda ensemble: ensemble.eval(),
    "a mode of the members": lambda ensemble: ensemble.network.train(False),
    "no gradients": lambda ensemble: ensemble.requires_grad_(True),
    "a number": lambda ensemble: setattr(ensemble, "scale", ensemble.network.scale),
    "a number of a part": lambda ensemble: setattr(ensemble.network.norm, "eps", ensemble.network.norm.eps),
    "a name": lambda ensemble: setattr(ensemble.network, "name", ensemble.network.name),
    "nothing": lambda ensemble: setattr(ensemble.network, "label", None),
}


class Labelled(Net):
    def __init__(self):
        super().__init__()
        self.name, self.label = "labelled", None


@pytest.mark.parametrize("write", REPEATED.values(), ids=REPEATED)
def test_what_a_sampler_sets_again_at_every_evaluation_keeps_the_plan(write):
    ensemble = planned(Labelled)
    for _ in range(6):
        write(ensemble)
        with torch.no_grad():
            ensemble(X)
    (entry,) = ensemble._engine.plans.entries
    assert entry.calls >= 6


class Moving(Net):
    """Moves its tables to where its input is, as published networks do: they are there, so nothing changes."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.held, self.listed, self.named = torch.arange(4.0), [torch.arange(4.0)], {"a": torch.arange(4.0)}
        self.register_buffer("own", torch.randn(4))

    def forward(self, x):
        move = self.move
        self.held, self.listed[0], self.named["a"] = (
            move(self.held, x),
            move(self.listed[0], x),
            move(self.named["a"], x),
        )
        self.own, self.offset = move(self.own, x), move(self.offset, x)
        return super().forward(x) * self.own + self.held + self.listed[0] * self.named["a"]


MOVES = {
    "to a device": lambda t, x: t.to(x.device),
    "to a dtype": lambda t, x: t.to(dtype=x.dtype),
    "as another": lambda t, x: t.to(x),
    "by type": lambda t, x: t.type_as(x),
    "by name": lambda t, x: t.cpu().float(),
    "contiguous": lambda t, x: t.contiguous(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_table_that_is_moved_to_where_it_is_has_a_plan(move):
    ensemble = planned(lambda: Moving(move))
    for factor in (1, 2):
        for tensor in (ensemble.network.held, ensemble.network.offset):
            tensor.mul_(factor)
        with torch.no_grad():
            for _ in range(4):
                assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5
    (entry,) = ensemble._engine.plans.entries
    assert entry.calls == 3  # the first of four after a write is the members'


class Counts(Net):
    """Its output depends on how often its level was set."""

    def forward(self, x):
        return super().forward(x) * self.__dict__["writes"]

    def write(self, level):
        self.__dict__.update(level=level, writes=self.__dict__.get("writes", 0) + 1)


class ByProperty(Counts):
    level = property(lambda self: self.__dict__["level"], Counts.write)

    def __init__(self):
        super().__init__()
        self.level = 2


class BySetter(Counts):
    def __init__(self):
        super().__init__()
        self.level = 2

    def __setattr__(self, name, value):
        self.write(value) if name == "level" else super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [ByProperty, BySetter])
def test_the_same_value_again_is_a_write_where_the_class_does_more_than_keep_it(kind):
    ensemble = planned(kind)
    ensemble.network.level = 2
    assert ensemble.network.__dict__["writes"] == 2
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


class Annotated(nn.Module):
    scale: float

    def __init__(self):
        super().__init__()
        self.scale = 2.0


def test_a_watched_module_reads_of_its_class_what_it_did():
    module = Annotated()
    of_classes = {"__class__", "__init_subclass__", "__subclasshook__"}
    names = set(dir(module)) - {"__dict__", "_modules", *of_classes, *HOOKS}
    before = {name: getattr(module, name) for name in names}
    watch(module, Barrier())
    changed = {name for name in names if getattr(module, name) != before[name]}
    assert changed == {"__setattr__", "__delattr__"}
