"""What a network writes to: the caller's arguments, and its own state, also where a pass fails half-way."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import fastens

K = 3
CONTEXTS = (torch.no_grad, torch.inference_mode, torch.enable_grad)


def members(kind, *args):
    torch.manual_seed(0)
    return [kind(*args) for _ in range(K)]


def error(found, expected):
    return float((found - expected).abs().max())


class Writes(nn.Module):
    """Writes to its first argument where the second is positive, and reads both afterwards."""

    def __init__(self, gain=2.0):
        super().__init__()
        self.inner, self.gain = nn.Linear(4, 4), gain

    def forward(self, x, y):
        if y.sum() > 0:
            x.mul_(self.gain)
        return self.inner(x) + y


class WritesOwn(Writes):
    """What it writes differs between members."""

    def forward(self, x, y):
        x += self.inner(y)
        return self.inner(x) + y


class Unconditional(Writes):
    """Has a plan."""

    def forward(self, x, y):
        x.mul_(self.gain)
        x[0] += 1
        return self.inner(x) + y


def apart(x):
    return x, x.flip(0)


ARGUMENTS = {
    "apart": apart,
    "one": lambda x: (x, x),
    "overlapping": lambda x: (x[:4], x[1:]),
    "whole and part": lambda x: (x[2:], x[:-2]),
    "transposed": lambda x: (x[:4], x[:4].T),
}
ENSEMBLES = {
    "fold": lambda kind: (members(kind), {}),
    "loop": lambda kind: (members(kind), {"engine": "loop"}),
    "members that differ": lambda kind: ([*members(kind)[1:], kind(3.0)], {}),
}


@pytest.mark.filterwarnings("ignore:fastens")
@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("shared", ARGUMENTS)
@pytest.mark.parametrize("made", ENSEMBLES)
@pytest.mark.parametrize("kind", [Writes, WritesOwn, Unconditional], ids=lambda c: c.__name__)
def test_arguments_that_are_written_to(kind, made, shared, context):
    own, options = ENSEMBLES[made](kind)
    ensemble, share = fastens.Ensemble(own, **options), ARGUMENTS[shared]
    for sign in (-1, -1, 1, 1, -1, 1):  # the first calls do not take the branch
        x = sign * torch.rand(5 if shared != "transposed" else 4, 4)
        with context():
            expected = sum(m(*share(x.clone())) for m in own) / K
            args = share(x.clone())
            kept = [a.clone() for a in args]
            found = ensemble(*args)
        assert error(found, expected) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))


@pytest.mark.filterwarnings("ignore:fastens")
def test_gradients_reach_arguments_that_share_memory():
    own = members(Writes)
    ensemble, base = fastens.Ensemble(own), torch.rand(5, 4)

    def gradient(call):
        leaf = base.clone().requires_grad_()
        whole = leaf * 1
        call(whole[:4], whole[1:]).square().sum().backward()
        return leaf.grad

    expected = gradient(lambda x, y: sum(m(*_views(x, y)) for m in own) / K)
    assert error(gradient(ensemble), expected) < 1e-4


def _views(x, y):
    """The arguments in memory of their own, sharing it as they do."""
    whole = x._base.clone()
    return whole[:4], whole[1:]


def test_dropout_members_write_to_copies():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.inner(x.mul_(2)))

    torch.manual_seed(0)
    ensemble = fastens.MCDropout(Dropping(), K)
    x = torch.rand(5, 4)
    kept = x.clone()
    with torch.no_grad():
        found = [ensemble.member_outputs(x) for _ in range(3)]
        expected = torch.stack([ensemble.members[k](x) for k in range(K)])
    assert torch.equal(x, kept)
    assert all(error(each, expected) < 1e-5 for each in found)


class Counts(nn.Module):
    """Counts its calls, in a buffer and in an attribute; a late branch asks for what differs between members."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.kept = nn.Linear(4, 4), 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, late=None):
        self.count += 1
        self.calls += 1
        self.kept.append(self.calls)
        h = self.inner(x)
        if late is not None and late > 0 and h.sum() > 0:
            h = -h
        return h * self.count + self.calls + len(self.kept)


class Remembers(nn.Module):
    """Adds what its last call left behind."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), None

    def forward(self, x, late=None):
        h = self.inner(x)
        h = h if self.last is None else h + self.last
        self.last = h.detach().mean(0)
        if late is not None and late > 0 and h.sum() > 0:
            h = -h
        return h


class Caches(nn.Module):
    """Makes what it needs of its weights at its first call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, late=None):
        if not hasattr(self, "cache"):
            self.register_buffer("cache", self.inner.weight.detach().sum(0), persistent=False)
        return self.inner(x) + self.cache


STATEFUL = [Counts, Remembers, Caches]


@pytest.mark.filterwarnings("ignore:fastens")
@pytest.mark.parametrize("kind", STATEFUL, ids=lambda c: c.__name__)
def test_a_pass_that_fails_half_way_leaves_no_state_behind(kind):
    own = members(kind)
    ensemble, loop = fastens.Ensemble(own), copy.deepcopy(own)
    with torch.no_grad():
        for late in (0, 0, 0, 1, 1, 0):
            x, late = torch.randn(5, 4), torch.tensor(late)
            assert error(ensemble(x, late), sum(m(x, late) for m in loop) / K) < 1e-5


@pytest.mark.filterwarnings("ignore:fastens")
@pytest.mark.parametrize("kind", STATEFUL, ids=lambda c: c.__name__)
def test_state_belongs_to_members_and_not_to_rows(kind):
    own = members(kind)
    ensemble, loop = fastens.Ensemble(own), copy.deepcopy(own)
    with torch.no_grad():
        for rows in ([0, 1, 2, 1], [2, 2, 0, 1], [0, 0, 0, 0], [1, 0], None, [0, 1, 2, 1]):
            x = torch.randn(4 if rows is None else len(rows), 4)
            if rows is None:
                assert error(ensemble(x), sum(m(x) for m in loop) / K) < 1e-5
                continue
            theirs = {k: loop[k](x) for k in sorted(set(rows))}
            with ensemble.assigned(rows):
                found = ensemble(x)
            assert error(found, torch.stack([theirs[k][i] for i, k in enumerate(rows)])) < 1e-5


@pytest.mark.parametrize("num_members", [1, 2])
def test_state_first_written_in_inference_mode(num_members):
    own = members(Counts)[:num_members]
    ensemble, loop = fastens.Ensemble(own), copy.deepcopy(own)
    for context in CONTEXTS:
        with context():
            x = torch.randn(5, 4)
            assert error(ensemble(x), sum(m(x) for m in loop) / num_members) < 1e-5


def test_a_buffer_made_in_forward_is_each_members_own_whatever_is_loaded():
    own = members(Caches)
    ensemble = fastens.Ensemble(own)
    x = torch.randn(5, 4)
    with torch.no_grad():
        for _ in range(3):
            ensemble(x)
        assert not any(hasattr(m, "cache") for m in own)
        assert list(ensemble.state_dict()) == ["network.inner.weight", "network.inner.bias"]
        ensemble.load_state_dict({n: v.clone() for n, v in ensemble.state_dict().items()}, assign=True)
        for rows in (5, 2):
            x = torch.randn(rows, 4)
            assert error(ensemble(x), sum(m(x) for m in copy.deepcopy(own)) / K) < 1e-5


class Swaps(nn.Module):
    """Calls a layer with other weights than its own, by ``functional_call``."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        weights = {"weight": self.other.weight * 0.5, "bias": self.inner.bias * 2}
        y = torch.func.functional_call(self.inner, weights, (x,))
        values = dict(self.other.named_parameters())

        def energy(x):
            return torch.func.functional_call(self.other, values, (x,)).square().sum()

        return y + torch.func.grad(energy)(x)


@pytest.mark.filterwarnings("ignore:fastens")
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_functional_call_in_a_member_leaves_its_weights_alone(engine):
    own = members(Swaps)
    ensemble = fastens.Ensemble(own, engine=engine)
    before = {n: v.clone() for n, v in ensemble.state_dict().items()}
    for rows in (5, 2):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            for _ in range(3):
                assert error(ensemble(x), sum(m(x) for m in own) / K) < 1e-5
    assert all(torch.equal(v, before[n]) for n, v in ensemble.state_dict().items())


class Hooked(nn.Module):
    """Keeps what a layer gave, by a hook that is a method of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner.register_forward_hook(self.keep)
        self.outer.register_forward_pre_hook(functools.partial(self.add, 1.0))

    def keep(self, _, args, output):
        self.kept = output

    def add(self, number, _, args):
        return (args[0] + number + self.kept,)

    def forward(self, x):
        return self.outer(self.inner(x).tanh()) + self.kept


@pytest.mark.filterwarnings("ignore:fastens")
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_hooks_that_are_methods_of_a_member_are_each_members_own(engine):
    own = members(Hooked)
    ensemble = fastens.Ensemble(own, engine=engine)
    seen = []
    with torch.no_grad():
        for rows in (5, 2, 5):
            x = torch.randn(rows, 4)
            assert error(ensemble(x), sum(m(x) for m in own) / K) < 1e-5
        handle = ensemble.network.inner.register_forward_hook(lambda *_: seen.append(1))
        assert error(ensemble(x), sum(m(x) for m in own) / K) < 1e-5
        assert seen
        handle.remove()
        seen.clear()
        assert error(ensemble(x), sum(m(x) for m in own) / K) < 1e-5
        assert not seen


class CountsRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), len(x)


def test_a_number_that_depends_on_the_rows_is_that_of_all():
    own = members(CountsRows)
    x = torch.randn(5, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert fastens.Ensemble(own, max_fold=2)(x)[1] == 5
        ensemble = fastens.Ensemble(own)
        with ensemble.assigned([0, 1, 2, 1, 0]):
            assert ensemble(x)[1] == 5
