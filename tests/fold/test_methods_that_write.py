"""Methods that change weights, as merging adapters does: all members' at once, or none where that fails."""

import copy
from contextlib import contextmanager, nullcontext

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


def _of_parameters(net, trained):
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(trained))


def _of_attributes(net, trained):
    for name, p in net.named_parameters():
        p.requires_grad = name.startswith(trained)


def _of_modules(net, trained):
    net.requires_grad_(False)
    getattr(net, trained).requires_grad_(True)


def _turned(net, trained):
    for p in net.parameters():
        p.requires_grad_(not p.requires_grad)


def _by_calls(net, trained):
    net.a.requires_grad_(net.calls % 2 == 0)


SWITCHES = {"parameters": _of_parameters, "attributes": _of_attributes, "modules": _of_modules, "turned": _turned}


class Switching(nn.Module):
    """Counts its calls, so that members which are looped have state of their own."""

    def __init__(self, switch):
        super().__init__()
        self.a, self.b, self.switch, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), switch, 0

    def train_only(self, name):
        self.switch(self, name)

    @contextmanager
    def training_only(self, name):
        self.switch(self, name)
        yield
        self.switch(self, "a" if name == "b" else "b")

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("called", [False, True])
def test_what_is_trained_is_so_in_the_stacks(switch, engine, mode, called):
    members, x = [Switching(SWITCHES[switch]) for _ in range(2)], torch.randn(3, 4)
    ens = fastens.Ensemble(members, engine=engine)
    if called:
        ens(x)
    for name in ("b", "a"):
        with mode():
            ens.train_only(name)
            for member in members:
                member.train_only(name)
        for each in (ens, members[0]):
            each.zero_grad()
            if any(p.requires_grad for p in each.parameters()):
                each(x).sum().backward()
        own = dict(members[0].named_parameters())
        assert {n: p.requires_grad for n, p in ens.network.named_parameters()} == {
            n: p.requires_grad for n, p in own.items()
        }
        assert all((p.grad is None) is (own[n].grad is None) for n, p in ens.network.named_parameters())


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "turned"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_is_trained_in_a_scope_is_so_in_the_stacks(switch, engine):
    members, x = [Switching(SWITCHES[switch]) for _ in range(2)], torch.randn(3, 4)
    ens = fastens.Ensemble(members, engine=engine)
    ens(x)

    def trained():
        return {n for n, p in ens.network.named_parameters() if p.requires_grad}

    with ens.training_only("b"):
        assert trained() == {"b.weight", "b.bias"}
    assert trained() == {"a.weight", "a.bias"}


def test_members_that_disagree_on_it_are_an_error():
    members, x = [Switching(_by_calls) for _ in range(3)], torch.randn(3, 4)
    ens = fastens.Ensemble(members, engine="loop")
    with ens.assigned([0, 0, 1]):
        ens(x)
    with pytest.raises(ValueError, match="trained in some members"):
        ens.train_only("a")
    assert all(p.requires_grad for p in ens.parameters())


class Initialised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + self.calls

    def drawn(self):
        self.layer.reset_parameters()

    def constant(self):
        nn.init.constant_(self.layer.bias, 0.25)
        nn.init.zeros_(self.layer.bias)

    def scaled(self):
        self.layer.weight = nn.Parameter(self.layer.weight.detach() * 1.5)

    def scaled_and_frozen(self):
        self.layer.weight = nn.Parameter(self.layer.weight.detach() * 1.5, False)


def _initialised():
    members = []
    for k in range(3):
        torch.manual_seed(k)
        members.append(Initialised())
    return members


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("method", ["drawn", "constant"])
def test_a_method_initialises_each_members_own_weights(method, engine, called):
    ensemble, members = fastens.Ensemble(_initialised(), engine=engine), _initialised()
    x = torch.ones(2, 4)
    with torch.no_grad():
        for each in (ensemble, *members) if called else ():
            each(x)
        torch.manual_seed(0)
        getattr(ensemble, method)()
        torch.manual_seed(0)
        for member in members:
            getattr(member, method)()
        assert relative_error(ensemble(x), torch.stack([member(x) for member in members]).mean(0)) < 1e-5


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("method", ["scaled", "scaled_and_frozen"])
def test_a_parameter_that_a_method_puts_in_is_one_and_begins_without_gradient(method, engine, called):
    ensemble, members = fastens.Ensemble(_initialised(), engine=engine), _initialised()
    x = torch.ones(2, 4)
    for each in (ensemble, *members):
        if called:
            each(x).sum().backward()
        getattr(each, method)()
    stack = dict(ensemble.network.named_parameters())["layer.weight"]
    assert type(stack) is nn.Parameter
    assert stack.requires_grad is members[0].layer.weight.requires_grad
    found, expected = ensemble(x), torch.stack([member(x) for member in members]).mean(0)
    assert relative_error(found, expected) < 1e-5
    for each in (found, expected):
        each.sum().backward()
    if stack.requires_grad:
        assert stack.grad is not None
        assert relative_error(stack.grad, torch.stack([member.layer.weight.grad for member in members])) < 1e-5


class Merging(nn.Module):
    """Adds weights of its own to those of a layer that all members have."""

    def __init__(self, base):
        super().__init__()
        self.base, self.own = base, nn.Parameter(torch.randn(base.weight.shape))

    def merge(self):
        self.base.weight.data = self.base.weight.data + self.own.data

    def forward(self, x):
        return self.base(x) * self.own.sum()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("layer", ["linear", "convolution", "embedding"])
def test_weights_that_lost_their_memory_are_an_error(layer, assigned, engine, grad):
    """Past the ensemble's methods torch asks nobody about ``.data``; kernels ended the process once."""
    base, x = {
        "linear": lambda: (nn.Linear(4, 4), torch.randn(2, 4)),
        "convolution": lambda: (nn.Conv2d(4, 4, 3), torch.randn(2, 4, 5, 5)),
        "embedding": lambda: (nn.Embedding(4, 4), torch.tensor([1, 2])),
    }[layer]()
    base.requires_grad_(False)
    ensemble = fastens.Ensemble([Merging(base) for _ in range(2)], engine=engine)
    with torch.set_grad_enabled(grad), ensemble.assigned([0, 1]) if assigned else nullcontext():
        ensemble(x)
        ensemble.network.merge()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"base.weight: `.data` of a weight that all members share"):
                ensemble(x)


class Sampling(nn.Module):
    """Its methods take no tensors, and read what differs between members."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(4, 4), None

    def forward(self, x):
        return self.layer(x)

    def sample(self, num):
        self.table = torch.ones(num, 4)
        h = self(self.table)
        return h * 0 if h.isnan().any() else h

    def drawn(self, num):
        return torch.distributions.Categorical(logits=100 * self(torch.ones(num, 4))).sample()

    def largest(self, num):
        return float(self(torch.ones(num, 4)).max())


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_what_runs_on_each_member_leaves_an_optimizer_its_parameters(engine):
    members = [Sampling() for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.1)
    singles = torch.optim.Adam([p for member in members for p in member.parameters()], lr=0.1)
    x = torch.randn(5, 4)
    for num in (2, 3, 3):
        with torch.no_grad():
            expected = torch.stack([member.sample(num) for member in members]).mean(0)
            assert relative_error(ensemble.sample(num), expected) < 1e-6
        for each, outputs in ((optimizer, ensemble.member_outputs), (singles, None)):
            each.zero_grad()
            found = torch.stack([member(x) for member in members]) if outputs is None else outputs(x)
            found.square().sum().backward()
            each.step()
        assert relative_error(ensemble(x), torch.stack([member(x) for member in members]).mean(0)) < 1e-5


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize(("method", "what"), [("drawn", "different torch.int64"), ("largest", "return .* and ")])
def test_values_that_members_return_alone_are_refused_where_they_differ(method, what, engine):
    members = [Sampling() for _ in range(3)]
    for k, member in enumerate(members):
        nn.init.zeros_(member.layer.weight)
        member.layer.bias.data = 2.0 * nn.functional.one_hot(torch.tensor(k), 4).float() + k
    ensemble = fastens.Ensemble(members, engine=engine)
    with pytest.raises(TypeError, match=what):
        getattr(ensemble, method)(3)
    members[1].load_state_dict(members[0].state_dict())
    with torch.no_grad():
        members[1].layer.weight[3] -= 1.0  # of what none is drawn
    ensemble = fastens.Ensemble(members[:2], engine=engine)
    assert torch.equal(torch.as_tensor(getattr(ensemble, method)(3)), torch.as_tensor(getattr(members[0], method)(3)))
