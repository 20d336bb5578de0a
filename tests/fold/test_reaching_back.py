"""Members that hold what ``copy.deepcopy`` keeps as it is, and that reaches a part of them: copies would share it."""

import functools
import itertools
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastens
from fastens.network.reaching_back import reaches_back
from tests.networks import randomised

K = 3


class CopiedAsItIs:
    def __init__(self, function):
        self.function = function

    def __deepcopy__(self, memo):
        return self


def with_attribute(layer):
    def function(x):
        return x

    function.layer = layer
    return function


def wrapping(method):
    @functools.wraps(method)
    def function(x):
        return x

    return function


def slotted(value):
    class Slotted:
        __slots__ = ("value",)

    held = Slotted()
    held.value = value
    return held


def class_of(layer):
    return type("Made.<locals>.Made", (), {"layer": layer, "__qualname__": "made.<locals>.Made"})


# what a member holds, and what it computes by that
KEPT = {
    "weak reference": (lambda m: weakref.ref(m.layer), lambda m, x: m.held()(x)),
    "weak reference to a weight": (lambda m: weakref.ref(m.layer.weight), lambda m, x: x @ m.held()),
    "weak reference to itself": (lambda m: weakref.ref(m), lambda m, x: m.held().layer(x)),
    "weak method": (lambda m: weakref.WeakMethod(m.method), lambda m, x: m.held()(x)),
    "weak values": (lambda m: weakref.WeakValueDictionary(a=m.layer), lambda m, x: m.held["a"](x)),
    "weak keys": (lambda m: weakref.WeakKeyDictionary({m.layer: 1}), lambda m, x: next(iter(m.held))(x)),
    "weak set": (lambda m: weakref.WeakSet([m.layer]), lambda m, x: next(iter(m.held))(x)),
    "cache of a method": (lambda m: functools.lru_cache(m.method), lambda m, x: m.held(x)),
    "cache of a function": (lambda m: functools.cache(lambda: m.layer), lambda m, x: m.held()(x)),
    "closure": (lambda m: lambda x: m.layer(x), lambda m, x: m.held(x)),
    "default": (lambda m: lambda x, layer=m.layer: layer(x), lambda m, x: m.held(x)),
    "attribute of a function": (lambda m: with_attribute(m.layer), lambda m, x: m.held.layer(x)),
    "wrapped method": (lambda m: wrapping(m.method), lambda m, x: m.held.__wrapped__(x)),
    "in objects": (
        lambda m: types.SimpleNamespace(a=[types.SimpleNamespace(b=weakref.ref(m.layer))]),
        lambda m, x: m.held.a[0].b()(x),
    ),
    "in a set": (lambda m: {lambda x: m.layer(x)}, lambda m, x: next(iter(m.held))(x)),
    "in a slot": (lambda m: slotted(lambda x: m.layer(x)), lambda m, x: m.held.value(x)),
    "class": (lambda m: class_of(m.layer), lambda m, x: m.held.layer(x)),
    "object of a class": (lambda m: class_of(m.layer)(), lambda m, x: m.held.layer(x)),
    "copied as it is": (lambda m: CopiedAsItIs(m.layer), lambda m, x: m.held.function(x)),
    "method of a list": (
        lambda m: m.list.append,
        lambda m, x: (m.list.clear(), m.held(1.0), m.layer(x) * sum(m.list, 1.0))[-1],
    ),
    "dispatch": (lambda m: functools.singledispatch(lambda x: m.layer(x)), lambda m, x: m.held(x)),
    "iterator": (lambda m: (each for each in itertools.repeat(m.layer)), lambda m, x: next(m.held)(x)),
}
COPIED = {
    "weak proxy": (lambda m: types.SimpleNamespace(a=weakref.proxy(m.layer)), lambda m, x: m.held.a(x)),
    "method": (lambda m: m.method, lambda m, x: m.held(x)),
    "partial": (lambda m: functools.partial(m.method), lambda m, x: m.held(x)),
    "itself": (lambda m: types.SimpleNamespace(member=m), lambda m, x: m.held.member.layer(x)),
    "handle of a hook": (lambda m: m.layer.register_forward_hook(twice), lambda m, x: m.layer(x)),
    "weak reference to another": (lambda m: weakref.ref(OTHER), lambda m, x: m.layer(x) * m.held().gain),
    "closure over another": (lambda m: lambda: OTHER, lambda m, x: m.layer(x) * m.held().gain),
    "ordered": (lambda m: OrderedDict(a=m.layer), lambda m, x: m.held["a"](x)),
}
OTHER = nn.Linear(1, 1)
OTHER.gain = 2.0


def twice(module, args, output):
    return output * 2


class Holding(nn.Module):
    def __init__(self, make, how):
        super().__init__()
        self.layer, self.list = nn.Linear(4, 4), []
        self.held, self.how = make(self), how

    def method(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.how(self, x)


def x_of(seed):
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def check(ensemble, members, seed):
    output = ensemble.member_outputs(x_of(seed))
    for k, member in enumerate(members):
        torch.testing.assert_close(output[k], member(x_of(seed)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", [*KEPT, *COPIED])
@torch.no_grad()
def test_members_are_those_handed_in(kind, engine):
    members = [randomised(lambda: Holding(*(KEPT | COPIED)[kind]), seed) for seed in range(K)]
    ensemble = fastens.Ensemble(members, engine=engine)
    if kind != "weak proxy":  # whose copy is the object itself, another class
        assert ensemble.engine == ("fold" if kind in COPIED and engine == "auto" else "loop")
    for seed in range(4):
        check(ensemble, members, seed)
    held = kind in KEPT  # as the modules that they are, whose weights are the ensemble's
    for p in ensemble.parameters():
        p.mul_(1.5)
    for p in (p for member in members for p in member.parameters() if not held):
        p.mul_(1.5)
    for seed in range(4, 6):
        check(ensemble, members, seed)


@pytest.mark.parametrize("kind", [*KEPT, *COPIED])
def test_what_is_kept_is_told(kind):
    make, how = (KEPT | COPIED)[kind]
    member = Holding(make, how)
    if kind not in ("weak method", "iterator"):  # which nobody can copy at all
        assert (reaches_back(member) is not None) == (kind in KEPT)
        assert kind in COPIED or reaches_back(member).name == "held"


class Child(nn.Module):
    """Asks its parent, which it does not hold, for a weight."""

    def __init__(self, parent):
        super().__init__()
        vars(self)["parent"] = weakref.ref(parent)

    def forward(self, x):
        return self.parent().layer(x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.child = Child(self)

    def forward(self, x):
        return self.child(x)


@torch.no_grad()
def test_a_weak_reference_to_a_parent():
    members = [randomised(Parent, seed) for seed in range(K)]
    with pytest.warns(UserWarning, match=r"child\.parent reaches a part of its member by a weak reference"):
        ensemble = fastens.Ensemble(members)
    for seed in range(3):
        check(ensemble, members, seed)
