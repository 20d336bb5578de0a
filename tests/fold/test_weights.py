"""The state of weights: another one after every write that torch counts, at a cost that hardly grows with them."""

import copy
import sys

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.network import weights
from fastens.network.weights import Weights
from tests.networks import randomised

native = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


@pytest.fixture(params=["library", "python"])
def look(request, monkeypatch):
    """Whether the library looks, or Python."""
    if request.param == "library" and not _native.load():
        pytest.skip(f"no compiled library: {_native.status()}")
    if request.param == "python":
        monkeypatch.setattr(weights, "_watch_of", lambda tensors: None)
    return request.param


def tensors(count=6):
    return [nn.Parameter(torch.randn(3, 4)) if i % 2 else torch.randn(3, 4) for i in range(count)]


def swapped(t):
    torch.utils.swap_tensors(t, type(t)(torch.randn(3, 4)))


WRITES = {
    "in place": lambda t: t.mul_(2),
    "a view": lambda t: t[1].zero_(),
    "a detached one": lambda t: t.detach().add_(1),
    "data": lambda t: setattr(t, "data", torch.randn(3, 4)),
    "set_": lambda t: t.set_(torch.randn(3, 4)),
    "foreach": lambda t: torch._foreach_mul_([t.detach()], 2),
    "counted by hand": torch.autograd.graph.increment_version,
    "swapped": swapped,
    "a part of its memory": lambda t: setattr(t, "data", t.data[:, 1:]),
    "the front of its memory": lambda t: setattr(t, "data", t.data[:-1]),
    "other strides": lambda t: setattr(t, "data", t.data.as_strided(t.shape, (t.stride(0) - 1, 1))),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("at", [0, 3, 5])
def test_every_write_is_another_state(look, write, at):
    held = Weights(given := tensors())
    states = [held.state()]
    for _ in range(2):
        assert held.state() == states[-1]
        write(given[at])
        states.append(held.state())
        assert states[-1] not in states[:-1]
    assert held.state() == states[-1]
    assert (held._watch is not None) is (look == "library")


@torch.no_grad()
def test_one_swapped_with_another_is_another_state(look):
    held = Weights(given := tensors())
    before = held.state()
    torch.utils.swap_tensors(given[0], given[2])
    assert held.state() != before


@torch.no_grad()
def test_no_tensor_is_held_but_as_an_object_of_python(look):
    """A reference to the tensor inside would keep ``swap_tensors``, and conversions that use it, from working."""
    held = Weights(given := tensors())
    held.state()
    assert {t._use_count() for t in given} == {1}


def test_tensors_of_inference_mode_have_an_address_alone(look):
    with torch.inference_mode():
        made = torch.randn(3, 4)
    held = Weights([*tensors(), made])
    before = held.state()
    assert held.state() == before
    with torch.no_grad():
        held.tensors[0].zero_()
    after = held.state()
    assert after != before
    with torch.inference_mode():
        made.data = torch.randn(3, 4)
    assert held.state() != after


@pytest.mark.parametrize("kind", ["none", "a subclass", "on the meta device"])
def test_other_kinds_of_tensors(look, kind):
    class Own(torch.Tensor):
        pass

    given = tensors()
    if kind == "a subclass":
        given.append(torch.randn(3, 4).as_subclass(Own))
    elif kind == "on the meta device":
        given.append(torch.empty(3, 4, device="meta"))
    else:
        given = []
    held = Weights(given)
    before = held.state()
    assert held.state() == before
    if given:
        with torch.no_grad():
            given[-1].mul_(2)
        assert held.state() != before


@native
def test_lists_have_states_of_their_own():
    """A plan that rests on one list of tensors is not taken for one that rests on another."""
    assert len({Weights(tensors()).state() for _ in range(5)}) == 5


@native
@torch.no_grad()
def test_where_the_library_is_at_a_loss_python_looks(monkeypatch):
    held = Weights(given := tensors())
    states = [held.state()]
    monkeypatch.setattr(type(held._watch), "look", lambda self: -1)
    states += [held.state(), held.state()]
    assert states[0] != states[1] == states[2]
    given[2].zero_()
    assert held.state() not in states


# What a planned call asks


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x, t):
        for layer in self.layers:
            x = torch.tanh(layer(x)) * t[:, None]
        return x


@native
@torch.no_grad()
def test_guards_call_nothing_for_each_tensor_and_nothing_twice(monkeypatch):
    """A call is guarded by one look at the weights, the hooks and the context, whatever the depth of the network."""
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    x, t = torch.randn(3, 4), torch.rand(3)

    def calls_of(depth):
        ensemble = fastens.Ensemble([randomised(lambda: Deep(depth), seed) for seed in range(2)])
        for _ in range(2):
            ensemble(x, t)
        assert ensemble.report().plans
        called = []

        def note(frame, event, argument):
            if event == "call":
                called.append(frame.f_code.co_qualname)
            elif event == "c_call":
                called.append(argument.__qualname__)

        sys.setprofile(note)
        try:
            ensemble(x, t)
        finally:
            sys.setprofile(None)
        return called

    shallow, deep = calls_of(2), calls_of(30)
    assert shallow == deep
    assert [deep.count(f"Guards.{name}") for name in ("state", "hooked")] == [1, 1]
    assert deep.count("ordinary_context") == 1
    assert not any("data_ptr" in name or "modules" in name for name in deep)


@pytest.mark.parametrize("one_object", [False, True], ids=["equal", "one object"])
@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after calls"])
def test_frozen_members_that_are_trained_later_part(called, one_object):
    """A layer that is one object in all members stays one, as in the loop."""
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False) for _ in range(3)]
    for member in members[1:]:
        if one_object:
            member[0] = members[0][0]
        else:
            member[0].load_state_dict(members[0][0].state_dict())
    ensemble, x = fastens.Ensemble(members), torch.randn(5, 4)
    assert ensemble.network[0].weight.ndim == 2
    if called:
        ensemble(x)
    for module in (ensemble, *members):
        module.requires_grad_()
    ours = torch.optim.SGD(ensemble.parameters(), 0.1)
    theirs = torch.optim.SGD({p for m in members for p in m.parameters()}, 0.1)
    for _ in range(2):
        for optimizer, outputs in ((ours, ensemble.member_outputs(x)), (theirs, torch.stack([m(x) for m in members]))):
            optimizer.zero_grad()
            outputs.square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(ensemble.member_outputs(x), torch.stack([m(x) for m in members]))


@pytest.mark.parametrize("unfreeze", [
    lambda ensemble: [p.requires_grad_() for p in ensemble.parameters()],
    lambda ensemble: ensemble.network[0].requires_grad_(),
], ids=["parameters", "a module"])  # fmt: skip
@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after calls"])
def test_one_held_tensor_is_not_trained_for_all(unfreeze, called):
    member = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    members, x = [member, copy.deepcopy(member)], torch.randn(5, 4)
    torch.nn.init.zeros_(members[1][1].weight)
    ensemble = fastens.Ensemble(members)
    if called:
        ensemble(x)
    unfreeze(ensemble)
    with pytest.raises(ValueError, match=r"0\.weight is held once, .*ens\.requires_grad_\(\)"):
        ensemble(x)
    with torch.no_grad():
        ensemble(x)
    ensemble.requires_grad_()
    ensemble(x).sum().backward()
    assert ensemble.network._modules["0"]._parameters.get("weight").grad.shape == (2, 4, 4)
