"""What a plan rests on in the call itself: which arguments share storage, modes of torch, transforms."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastens
from fastens import _native
from tests.fold.test_guards import K, X, by_members, planned
from tests.networks import randomised
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a, b):
        return torch.tanh(self.left(a)) * self.right(b)


def pairs():
    a, b, big, wide = torch.randn(5, 4), torch.randn(5, 4), torch.randn(10, 4), torch.randn(2, 5, 8)
    return {
        "one twice": (a, a),
        "apart": (a, b),
        "halves": tuple(big.chunk(2)),
        "overlapping": (big[:5], big[3:8]),
        "reversed": (big[5:], big[:5]),
        "zeros": (torch._efficientzerotensor((5, 4), dtype=torch.float32), b),
        "expanded": (a[:1].expand(5, 4), b),
        "a view and its base": (big[:5], torch.as_strided(big, (5, 4), (4, 1), 0)),
        "negated": (torch.complex(a, b).conj().imag, b),
        "transposed": (torch.randn(4, 5).T, b),
        "with gaps": (torch.randn(5, 8)[:, ::2], b),
        "columns of one": tuple(wide[0].chunk(2, 1)),
        "columns of two": (wide[0, :, :4], wide[1].clone()[:, 4:]),
    }


@pytest.mark.parametrize("first", ["one twice", "apart", "halves", "zeros", "columns of one", "columns of two"])
def test_aliasing_and_layout_are_part_of_the_signature(first, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([randomised(Two, seed) for seed in range(K)])
    given = pairs()
    with torch.no_grad():
        for name in (first, *given, *given):
            a, b = given[name]
            expected = torch.stack([member(a, b) for member in ensemble.members]).mean(0)
            assert relative_error(ensemble(a, b), expected) < 1e-5, name


def test_autocast_is_the_members():
    ensemble = planned()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stack = torch.stack([member(X) for member in ensemble.members])
        outputs = ensemble.member_outputs(X)
    assert outputs.dtype == stack.dtype
    assert relative_error(outputs, stack) < 0.02
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


def test_forward_mode_derivatives_are_the_members():
    ensemble = planned()
    tangent = torch.randn_like(X)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(X, tangent)
        found = forward_ad.unpack_dual(ensemble(dual)).tangent
        expected = torch.stack([forward_ad.unpack_dual(member(dual)).tangent for member in ensemble.members]).mean(0)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_is_no_reason_to_fail(device, monkeypatch):
    ensemble = planned()
    expected = by_members(ensemble)
    with torch.no_grad(), torch.device(device):
        for _ in range(2):
            assert relative_error(ensemble(X), expected) < 1e-5
        if device == "cpu":
            (entry,) = ensemble._engine.plans.entries
            assert entry.calls == 4  # it is planned there too
    fresh = fastens.Ensemble(list(ensemble.members))
    with torch.no_grad(), torch.device(device):
        for _ in range(2):
            assert relative_error(fresh(X), expected) < 1e-5


@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev"])
def test_transforms_are_the_members(transform):
    ensemble = planned()
    members = list(ensemble.members)

    def through(function):
        if transform == "vmap":
            return torch.func.vmap(function)(X[:, None])
        if transform == "jvp":
            return torch.func.jvp(function, (X,), (torch.ones_like(X),))[1]
        return torch.func.jacrev(function)(X)

    with torch.no_grad():
        expected = torch.stack([through(member) for member in members]).mean(0)
        assert relative_error(through(ensemble), expected) < 1e-5
