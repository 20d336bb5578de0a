"""What is done to an ensemble's network from outside, and members of kinds that no fold sees into."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fastens
from tests.tolerances import NETWORK, relative_error


def sequential():
    return nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)).eval()


def mean_of(members, x):
    return torch.stack([member(x) for member in members]).mean(0)


def near(a, b):
    assert relative_error(a, b) < NETWORK[torch.float32]


INITIALISERS = {
    "ones": nn.init.ones_,
    "eye": nn.init.eye_,
    "orthogonal": nn.init.orthogonal_,
    "constant": lambda w: nn.init.constant_(w, 0.1),
    "normal": nn.init.normal_,
    "kaiming": nn.init.kaiming_uniform_,
    "normal of data": lambda w: w.data.normal_(),
    "uniform of data": lambda w: w.detach().uniform_(-1, 1),
    "new, then copied": lambda w: w.data.copy_(w.new_empty(6, 6).normal_()),
    "zeros like": lambda w: w.data.add_(torch.zeros_like(w).normal_()),
}
REFUSED = {
    "trunc_normal": nn.init.trunc_normal_,
    "set": lambda w: w.set_(w.detach().clone() * 2),
    "set of data": lambda w: w.data.set_(torch.zeros(6, 6)),
    "resize": lambda w: w.detach().resize_(3, 3),
}


def weights(change):
    return lambda module: change(module.weight) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", INITIALISERS)
def test_initialised_members_are_what_they_say(kind, engine, grad, monkeypatch):
    """And independent of each other where numbers are drawn; a plan notices."""
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble, x = fastens.Ensemble([sequential() for _ in range(3)], engine=engine), torch.randn(2, 6)
    with torch.no_grad():
        ensemble(x)
        with torch.set_grad_enabled(grad):
            ensemble.apply(weights(INITIALISERS[kind]))
        members = list(ensemble.members)
        for _ in range(2):
            near(ensemble(x), mean_of(members, x))
    same = torch.equal(members[0][0].weight, members[1][0].weight)
    assert same == (kind in ("ones", "eye", "constant"))


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_stacks_cannot_take_is_refused(kind, engine):
    ensemble, x = fastens.Ensemble([sequential() for _ in range(3)], engine=engine), torch.randn(2, 6)
    expected = ensemble(x)
    with pytest.raises(RuntimeError, match="do this to the members, and make the ensemble of them"):
        ensemble.apply(weights(REFUSED[kind]))
    torch.testing.assert_close(ensemble(x), expected)


REPARAMETRIZED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 0.3),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "taken away": lambda layer: delattr(layer, "weight"),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_a_stack_that_cannot_be_taken_away_leaves_nothing_changed(kind, engine):
    ensemble, x = fastens.Ensemble([sequential() for _ in range(3)], engine=engine), torch.randn(2, 6)

    def held():
        modules = [(path, type(m), [*m._parameters], [*m._buffers], len(m._forward_pre_hooks))
                   for path, m in ensemble.network.named_modules()]  # fmt: skip
        return modules, list(ensemble.state_dict())

    expected, before = ensemble(x), held()
    with pytest.raises((ValueError, RuntimeError), match="the members, and make the ensemble of them"):
        REPARAMETRIZED[kind](ensemble.network[0])
    assert held() == before
    torch.testing.assert_close(ensemble(x), expected)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("use", [lambda e, x: e(x), lambda e, x: e.members[0]], ids=["call", "members"])
def test_a_module_without_weights_yet_is_refused_with_the_remedy(use, engine):
    ensemble, x = fastens.Ensemble([sequential() for _ in range(3)], engine=engine), torch.randn(2, 6)
    ensemble.network[0] = nn.LazyLinear(6)
    with pytest.raises(ValueError, match=r"0\.weight, which was put into an ensemble.* call 0 once by itself"):
        use(ensemble, x)
    ensemble.network[0](x)
    torch.testing.assert_close(ensemble(x), torch.stack([member(x) for member in ensemble.members]).mean(0))


class Adapter(nn.Module):
    """A layer with weights of its own around another."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.arange(rank * 6.0).view(rank, 6) / 20)
        self.register_buffer("b", torch.arange(6.0 * rank).view(6, rank) / 20)

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("called", [False, True])
def test_a_module_put_in_later_is_kept(rank, called, engine):
    members, x = [sequential() for _ in range(3)], torch.randn(2, 6)
    ensemble = fastens.Ensemble(members, engine=engine)
    with torch.no_grad():
        if called:
            ensemble(x), ensemble(x)
        for network in (*members, ensemble.network):
            network[0] = Adapter(network[0], rank)
        for made in (ensemble, copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
            for _ in range(2):
                near(made(x), mean_of(members, x))
        near(mean_of(list(ensemble.members), x), mean_of(members, x))


class NotComparable:
    def __eq__(self, other):
        raise NotImplementedError("no comparison")

    __hash__ = object.__hash__


def holding():
    member = sequential()
    member.held = NotComparable()
    return member


OPAQUE = {
    "scripted": lambda: torch.jit.script(sequential()),
    "traced": lambda: torch.jit.trace(sequential(), torch.randn(2, 6)),
    "a scripted part": lambda: nn.Sequential(torch.jit.script(sequential()), nn.Linear(6, 6)),
    "an object without comparison": holding,
}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", OPAQUE)
def test_members_that_no_fold_sees_into_are_looped(kind, k, engine):
    members, x = [OPAQUE[kind]() for _ in range(k)], torch.randn(2, 6)
    ensemble = fastens.Ensemble(members, engine=engine)
    with torch.no_grad():
        for _ in range(2):
            near(ensemble(x), mean_of(members, x))
        with ensemble.assigned(torch.tensor([k - 1, 0])):
            near(ensemble(x), torch.cat([members[k - 1](x[:1]), members[0](x[1:])]))
