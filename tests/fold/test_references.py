"""Weights that attributes refer to past a module's tables, and buffers that a call registers."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, batch

HOLDERS = {
    "dict": lambda layer: {"weight": layer.weight, "bias": layer.bias},
    "list": lambda layer: [layer.weight, layer.bias],
    "tuple in a list": lambda layer: [(layer.weight, layer.bias)],
    "object": lambda layer: SimpleNamespace(weight=layer.weight, bias=layer.bias),
}
READ = {
    "dict": lambda held: held.values(),
    "list": lambda held: held,
    "tuple in a list": lambda held: held[0],
    "object": lambda held: (held.weight, held.bias),
}


class Referring(nn.Module):
    """Reads its weights by an attribute."""

    def __init__(self, holder):
        super().__init__()
        self.layer, self.other, self.holder = nn.Linear(4, 4), nn.Linear(4, 4), holder
        self.held = HOLDERS[holder](self.layer)

    def forward(self, x):
        return self.other(torch.tanh(nn.functional.linear(x, *READ[self.holder](self.held))))


def doubled(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def moved(module):
    for p in module.parameters():
        p.data = p.data * 2


def loaded(module, assign=False):
    module.load_state_dict({name: 2 * x for name, x in module.state_dict().items()}, assign=assign)


CHANGES = {
    "in place": doubled,
    "data": moved,
    "loaded": loaded,
    "frozen": lambda module: module.requires_grad_(False),
}
COPIES = {"copy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}
CALLS = {
    "nothing": lambda held: None,
    "samples": lambda held: held.sampling(batch(3, 4)),
    "trains": lambda held: held.gradients(batch(3, 4)),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("before", CALLS)
@pytest.mark.parametrize("change", [*CHANGES, *COPIES])
@pytest.mark.parametrize("holder", HOLDERS)
def test_references_follow_the_weights(holder, change, before, engine):
    held = Held(lambda k: Referring(holder), 2, engine=engine)
    CALLS[before](held)
    if change in COPIES:
        held.ensemble = COPIES[change](held.ensemble)
        held.each(doubled)
    else:
        held.each(CHANGES[change])
    held.sampling(batch(3, 4))
    held.gradients(batch(3, 4))
    held.sampling(batch(3, 4))
    assert held.ensemble.engine == ("loop" if engine == "loop" else "fold")


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("before", CALLS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_references_follow_a_conversion(holder, before, engine):
    held = Held(lambda k: Referring(holder), 2, engine=engine)
    CALLS[before](held)
    held.each(lambda module: module.double())
    held.sampling(lambda generator: (torch.randn(3, 4, generator=generator, dtype=torch.float64),), relative=1e-12)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_references_of_a_member_that_is_handed_out_are_its_own(holder, trained, engine):
    held = Held(lambda k: Referring(holder).requires_grad_(trained), 2, engine=engine)
    held.sampling(batch(3, 4))
    member, x = held.ensemble.members[1], torch.randn(3, 4)
    assert all(a is b for a, b in zip(READ[holder](member.held), member.layer.parameters(), strict=True))
    for module in (member, held.members[1]):
        doubled(module)
    torch.testing.assert_close(member(x), held.members[1](x))
    held.ensemble.replace_member(1, member)
    held.sampling(batch(3, 4))


class Registering(nn.Module):
    """Registers a buffer in each call, common or member-valued, of another number of dimensions by the call."""

    def __init__(self, common):
        super().__init__()
        self.layer, self.common = nn.Linear(4, 4), common

    def forward(self, x):
        y = self.layer(x)
        of = (x if self.common else y).detach()
        self.register_buffer("scale", of.amax() if x.ndim == 2 else of.amax(-1))
        return y * self.get_buffer("scale").sum()


@pytest.mark.parametrize("common", [False, True], ids=["member-valued", "common"])
@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("max_fold", [None, 1, 2])
def test_buffers_registered_in_a_pass_that_is_undone(max_fold, num_members, common):
    held = Held(lambda k: Registering(common), num_members, max_fold=max_fold)
    for shape in ((3, 4), (2, 3, 4), (3, 4)):
        held.sampling(batch(*shape), 2)
        held.gradients(batch(*shape))


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_members_that_refer_to_weights_that_were_are_handed_out(holder, engine, differentiated):
    members = [Referring(holder) for _ in range(3)]
    ensemble, x = fastens.Ensemble(copy.deepcopy(members), engine=engine), torch.randn(2, 4)
    for module in (ensemble, *members):
        loaded(module, assign=True)  # what the attribute refers to is no parameter any more
    with torch.set_grad_enabled(differentiated):
        ensemble(x)
        for handed_out, member in zip(ensemble.members, members, strict=True):
            torch.testing.assert_close(handed_out(x), member(x))
            assert all(weight.is_leaf for weight in READ[holder](handed_out.held))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("holder", HOLDERS)
def test_members_that_refer_to_weights_are_made_once_in_a_mode(holder, mode):
    """Copying all members is not what a call costs; the parts that attributes hold fit the mode that they are for."""
    held = Held(lambda k: Referring(holder), 2, engine="loop")
    x = torch.randn(3, 4)
    with mode():
        held.ensemble(x)
        views = held.ensemble._engine._views.get()
        held.ensemble(x)
        again = held.ensemble._engine._views.get()
    assert all(a is b for a, b in zip(views, again, strict=True))
