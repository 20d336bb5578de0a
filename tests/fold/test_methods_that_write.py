"""Methods that change weights, as merging adapters does: all members' at once, or none where that fails."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import relative_error


def _in_place(layer, delta):
    layer.base.weight.data += delta


def _under_no_grad(layer, delta):
    with torch.no_grad():
        layer.base.weight.add_(delta)


def _data(layer, delta):
    layer.base.weight.data = layer.base.weight.data + delta


def _out(layer, delta):
    torch.add(layer.base.weight.data, delta, out=layer.base.weight.data)


WAYS = {"in place": _in_place, "under no_grad": _under_no_grad, "data": _data, "out": _out}


class Adapted(nn.Module):
    """A linear layer, frozen, with an adapter of low rank."""

    def __init__(self, way):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.way, self.merged = way, False

    def merge(self):
        self.way(self, (self.up.weight @ self.down.weight).detach())
        self.merged = True

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))


class Layers(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a, self.b = Adapted(way), Adapted(way)

    def merge(self, fails=False):
        self.a.merge()
        if fails:
            raise KeyError("no such adapter")
        self.b.merge()

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Wrapped(nn.Module):
    """Leaves what it has not to the network inside, as libraries of adapters do."""

    def __init__(self, way):
        super().__init__()
        self.inner = Layers(way)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


def _members(kind, way, same):
    torch.manual_seed(0)
    members = [kind(WAYS[way]).eval() for _ in range(3)]
    for member in members:
        for name in same:
            getattr(member, name).base.load_state_dict(getattr(members[0], name).base.state_dict())
    return members


def _loop(members, x):
    return torch.stack([member(x) for member in members])


@pytest.mark.parametrize("kind", [Layers, Wrapped])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("same", ["", "a", "b", "ab"], ids=lambda same: same or "none")
def test_weights_that_members_have_in_common_become_their_own(kind, way, same):
    members, x = _members(kind, way, same), torch.randn(3, 4)
    ens, references = fastens.Ensemble(members), copy.deepcopy(members)
    with torch.no_grad():
        assert relative_error(ens.member_outputs(x), _loop(members, x)) < 1e-5
        ens.merge()
        for each in references:
            each.merge()
        assert relative_error(ens.member_outputs(x), _loop(references, x)) < 1e-5
        before = [each.state_dict() for each in members]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(before, _states(kind, way, same), strict=True) for n in a)
    assert ens.engine == "fold"


def _states(kind, way, same):
    return [member.state_dict() for member in _members(kind, way, same)]


@pytest.mark.parametrize("kind", [Layers, Wrapped])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("same", ["", "a", "b", "ab"], ids=lambda same: same or "none")
def test_a_method_that_fails_halfway_leaves_nothing_changed(kind, way, same):
    members, x = _members(kind, way, same), torch.randn(3, 4)
    ens = fastens.Ensemble(members)
    with torch.no_grad():
        expected = _loop(members, x)
        for _ in range(2):
            with pytest.raises(KeyError):
                ens.merge(fails=True)
            assert relative_error(ens.member_outputs(x), expected) < 1e-5
            assert not any(each.merged for each in ens.modules() if isinstance(each, Adapted))
