"""Python attributes of parameters and buffers, such as tags for an optimizer: members have them, so an ensemble has."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K = 3
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Tagged(nn.Module):
    """Its code reads what its weights are tagged with, and its method gives them to an optimizer by that."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("table", torch.arange(4.0))
        self.layer.weight.tags, self.layer.weight.scale = {"decay"}, scale
        self.shift.times, self.table.times = 3.0, 0.5

    def forward(self, x):
        h = self.layer(x) * self.layer.weight.scale + self.shift * self.shift.times
        return h + self.table * self.table.times if hasattr(self.table, "times") else h

    def groups(self):
        tagged = [p for p in self.parameters() if "decay" in getattr(p, "tags", ())]
        return [{"params": tagged}, {"params": [p for p in self.parameters() if all(p is not t for t in tagged)]}]

    def rescale(self, scale):
        self.layer.weight.scale = scale


class Counting(nn.Module):
    """Its code sets an attribute of its weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        weight = self.layer.weight
        weight.calls = getattr(weight, "calls", 0) + 1
        return self.layer(x) * weight.calls


def saved(ensemble):
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def members(*scales):
    found = [randomised(lambda scale=scale: Tagged(scale), k) for k, scale in enumerate(scales or [2.0] * K)]
    for k, member in enumerate(found):
        member.shift.add_(k)
    return found


def check(ensemble, singles):
    for _ in range(2):
        with torch.no_grad():
            expected = torch.stack([member(X) for member in singles]).mean(0)
            assert relative_error(ensemble(X), expected) < 1e-6
    assert relative_error(ensemble(X), expected) < 1e-6


WAYS = {
    "as it is": lambda e: e,
    "a copy": copy.deepcopy,
    "pickled": lambda e: pickle.loads(pickle.dumps(e)),
    "saved": saved,
    "of its members": lambda e: fastens.Ensemble(list(e.members)),
    "a member replaced": lambda e: (e.replace_member(1, e.members[1]), e)[1],
    "trained anew": lambda e: e.requires_grad_(False).requires_grad_(),
    "refreshed": lambda e: (e.refresh(), e)[1],
}


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("way", WAYS)
def test_are_those_of_the_members(way, engine):
    singles = members()
    ensemble = fastens.Ensemble(members(), engine=engine)
    check(ensemble, singles)
    ensemble = WAYS[way](ensemble)
    assert way == "of its members" or ensemble.engine == engine
    check(ensemble, singles)
    assert all(vars(member.layer.weight) == vars(singles[0].layer.weight) for member in ensemble.members)


@pytest.mark.parametrize("way", ["as it is", "a copy", "pickled", "saved"])
def test_members_whose_own_differ_are_looped(way):
    singles = members(2.0, 3.0, 2.0)
    with pytest.warns(UserWarning, match="differs from member 0 at layer.weight.scale: 2.0 against 3.0"):
        ensemble = fastens.Ensemble(members(2.0, 3.0, 2.0))
    check(WAYS[way](ensemble), singles)


def test_of_a_reader_of_checkpoints_or_of_a_compiler_make_no_difference():
    singles = members()
    singles[1].layer.weight._is_hf_initialized = True
    singles[2].layer.weight._dynamo_static_input_type = "unguarded"
    check(fastens.Ensemble(singles, engine="fold"), singles)


def test_that_hold_a_weight_of_the_member():
    singles = members()
    for member in singles:
        member.layer.bias.beside = [member.layer.weight]
        member.register_forward_hook(lambda module, args, out: out + module.layer.bias.beside[0].sum())
    with pytest.warns(UserWarning, match="layer.bias.beside, an attribute of a parameter or buffer, holds a weight"):
        ensemble = fastens.Ensemble(singles)
    check(ensemble, singles)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.mul_(2)
        for parameter in (p for member in singles for p in member.parameters()):
            parameter.mul_(2)
    check(ensemble, singles)


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_give_an_optimizer_its_groups(engine):
    singles = members()
    ensemble = fastens.Ensemble(members(), engine=engine)
    for module in (ensemble, *singles):
        optimizer = torch.optim.SGD(module.groups(), lr=0.1, weight_decay=0.0)
        optimizer.param_groups[0]["weight_decay"] = 0.9
        (module.member_outputs(X) if module is ensemble else module(X)).square().sum().backward()
        optimizer.step()
    check(ensemble, singles)
    for parameter in ensemble.parameters():
        assert parameter.ndim == 2 or parameter.tags == {"decay"}


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("gradients", [False, True])
def test_that_a_method_sets_are_read_in_the_next_call(engine, gradients):
    singles = members()
    ensemble = fastens.Ensemble(members(), engine=engine)
    for scale in (2.0, 5.0, 3.0):
        for module in (ensemble, *singles):
            module.rescale(scale)
        for _ in range(2):
            with torch.set_grad_enabled(gradients):
                expected = torch.stack([member(X) for member in singles]).mean(0)
                assert relative_error(ensemble(X), expected) < 1e-6


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("rule", ["mean", "alternating"])
def test_that_a_call_sets_are_refused(rule, engine):
    singles = [randomised(Counting, k) for k in range(K)]
    ensemble = fastens.Ensemble(singles, rule, engine=engine)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"set attributes of their parameters .*layer\.weight\.calls"):
            ensemble(X)
    assert not any(vars(member.layer.weight) for member in singles)
