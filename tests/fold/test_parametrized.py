"""Parametrized networks: a member's weights are its own, whatever torch keeps of them and whoever takes them apart."""

import gc
import re
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastens
from tests.tolerances import relative_error


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
}


class Network(nn.Module):
    """One that reads a weight twice, inside ``cached()`` where asked for."""

    def __init__(self, kind="weight_norm", cached=False):
        super().__init__()
        self.a, self.b, self.cached = KINDS[kind](nn.Linear(5, 5)), nn.Linear(5, 3), cached

    def forward(self, x):
        if not self.cached:
            return self.b(self.a(self.a(x).tanh()))
        with parametrize.cached():
            return self.b(self.a(self.a(x).tanh()))


def _members(kind="weight_norm", count=3, **options):
    torch.manual_seed(0)
    return [Network(kind, **options).eval() for _ in range(count)]


def _loop(members, x):
    return torch.stack([member(x) for member in members])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_each_member_has_its_own_weights_while_they_are_kept(kind, engine, grad):
    members, x = _members(kind), torch.randn(4, 5)
    ens = fastens.Ensemble(members, engine=engine)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            with parametrize.cached():
                expected = _loop(members, x)
                assert relative_error(ens.member_outputs(x), expected) < 1e-6
                assert relative_error(ens(x), expected.mean(0)) < 1e-6
                with ens.assigned([0, 1, 2, 1]):
                    assert relative_error(ens(x), expected[[0, 1, 2, 1], range(4)]) < 1e-6
                assert relative_error(_loop(ens.members, x), expected) < 1e-6
            assert relative_error(ens.member_outputs(x), expected) < 1e-6
    assert ens.engine == engine


@pytest.mark.filterwarnings(r"ignore:.*parametrize\.cached\(\):UserWarning")
def test_what_training_writes_is_written_as_often_as_by_the_loop():
    members, x = _members("spectral_norm"), torch.randn(4, 5)
    ens = fastens.Ensemble(members).train()
    for member in members:
        member.train()
    for _ in range(2):
        with parametrize.cached():
            for _ in range(2):
                assert relative_error(ens.member_outputs(x), _loop(members, x)) < 1e-6
    assert relative_error(ens.eval().member_outputs(x), _loop([m.eval() for m in members], x)) < 1e-6


def test_a_network_that_keeps_its_weights_itself_is_planned_and_right_beside_others():
    members, x = _members(cached=True), torch.randn(4, 5)
    ens = fastens.Ensemble(members)
    with torch.no_grad():
        expected = _loop(members, x)
        assert relative_error(ens.member_outputs(x), expected) < 1e-6
        assert "planned" in str(ens.report())
        found = []
        with parametrize.cached():  # as another thread may be in

            def call():
                with torch.no_grad():
                    found.extend(ens.member_outputs(x) for _ in range(3))

            other = threading.Thread(target=call)
            other.start()
            other.join()
            found.append(ens.member_outputs(x))
    assert len(found) == 4
    assert all(relative_error(each, expected) < 1e-6 for each in found)
    assert ens.engine == "fold"


def test_masks_are_of_weights_as_they_are_while_these_are_kept():
    torch.manual_seed(0)
    net, x = nn.Sequential(Network(), nn.Dropout(0.5)), torch.randn(4, 3 + 2)
    ens = fastens.MCDropout(net, 3)
    expected = ens.member_outputs(x)
    with parametrize.cached():
        assert relative_error(ens.member_outputs(x), expected) < 1e-6
        assert relative_error(_loop(ens.members, x), expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_taking_a_parametrization_off_one_leaves_the_others(kind):
    members, x = _members(kind), torch.randn(4, 5)
    ens = fastens.Ensemble(members)
    with torch.no_grad():
        expected = _loop(members, x)
        handed_out, kept = ens.members[0], ens.members[0]
        parametrize.remove_parametrizations(handed_out.a, "weight")
        assert relative_error(kept(x), expected[0]) < 1e-6
        assert relative_error(handed_out(x), expected[0]) < 1e-6
        assert relative_error(ens.member_outputs(x), expected) < 1e-6
        assert relative_error(members[0](x), expected[0]) < 1e-6
        parametrize.remove_parametrizations(members[0].a, "weight")
        assert relative_error(ens.member_outputs(x), expected) < 1e-6
        assert relative_error(kept(x), expected[0]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_replaced_by_modules_that_were_made_apart(kind):
    members, x = _members(kind, 4), torch.randn(4, 5)
    ens = fastens.Ensemble(members[:3])
    ens.replace_member(1, members[3])
    with torch.no_grad():
        assert relative_error(ens.member_outputs(x), _loop([members[0], members[3], members[2]], x)) < 1e-6
    assert ens.engine == "fold"


def test_members_can_be_dropped():
    members = _members()
    ens = fastens.Ensemble(members)
    first = weakref.ref(members[0].a)
    with torch.no_grad():
        ens(torch.randn(4, 5))
    del members
    ens.refresh()  # lets go of the members that first calls are held against
    gc.collect()
    assert first() is None


COMPUTING = {
    "weight_norm": (nn.utils.weight_norm, "parametrizations.weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "parametrizations.spectral_norm"),
    "pruning": (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
}
ON_ENSEMBLE = {
    **{name: (put_on, "weight is a stack .* put the former on the members") for name, (put_on, _) in COMPUTING.items()},
    "parametrized": (nn.utils.parametrizations.weight_norm, "weight is a stack .* put the former on the members"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "do this to the members"),
    "function": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        "do this to the members.* a parametrization",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTING)
def test_what_computes_weights_for_an_attribute_is_named_with_the_remedy(kind):
    members = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    for member in members:
        COMPUTING[kind][0](member[0])
    with pytest.warns(UserWarning, match=rf"at 0\.weight.*{re.escape(COMPUTING[kind][1])} on every member"):
        fastens.Ensemble(members)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ON_ENSEMBLE)
def test_what_computes_weights_is_put_on_members(kind):
    put_on, message = ON_ENSEMBLE[kind]
    members, x = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)], torch.randn(2, 4)
    ensemble = fastens.Ensemble(members)
    for _ in range(2):
        assert torch.allclose(ensemble(x), torch.stack([member(x) for member in members]).mean(0), atol=1e-6)
        with pytest.raises((ValueError, RuntimeError), match=message):
            put_on(ensemble.network[0])
