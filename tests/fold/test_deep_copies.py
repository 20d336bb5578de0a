"""What members hold is copied as it is, or the members themselves are looped."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import fastens
from fastens.network.deep_copies import copied
from tests.tolerances import NETWORK, relative_error


class OwnAttributes(dict):
    """A dictionary whose items are its attributes, as hyperparameters of audio models are kept."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class ByItems(OwnAttributes):
    """One that sets attributes as items."""

    __setattr__ = dict.__setitem__

    def __init__(self, **items):
        dict.__init__(self, **items)
        object.__setattr__(self, "__dict__", self)


class Forgets:
    """Copies come without what it holds."""

    def __init__(self, gain=1.0):
        self.gain = gain

    def __reduce__(self):
        return Forgets, ()


class Loses(Forgets):
    """Copies come without the attribute."""

    def __reduce__(self):
        return object.__new__, (Loses,)


class Gained(nn.Module):
    """A layer times a number that is kept in an object, which may count its calls."""

    def __init__(self, kept, find, counts=False):
        super().__init__()
        self.inner, self.kept, self.find, self.counts = nn.Linear(4, 4), kept, find, counts

    def forward(self, x: Tensor) -> Tensor:
        kept = self.find(self.kept)
        if self.counts:
            kept.gain = kept.gain + 1
        return self.inner(x) * kept.gain


def itself(kept):
    return kept


def first_of(kept):
    return kept[0]


def inner_of(kept):
    return kept.inner


def members_with(make, find, **options):
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(Gained(make(), find, **options).eval())
    return members


def near(found, wanted):
    assert relative_error(found, wanted) < NETWORK[torch.float32]


def mean_of(members, x):
    return torch.stack([member(x) for member in members]).mean(0)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(
    ("make", "find"),
    [
        (lambda: OwnAttributes(gain=3.0, dims=[1, 2]), itself),
        (lambda: ByItems(gain=3.0), itself),
        (lambda: [OwnAttributes(gain=3.0)], first_of),
        (lambda: OwnAttributes(inner=OwnAttributes(gain=3.0)), inner_of),
    ],
    ids=["plain", "by_items", "in_a_list", "nested"],
)
def test_dictionaries_that_are_their_own_attributes(make, find, counts):
    members, twins = members_with(make, find, counts=counts), members_with(make, find, counts=counts)
    ensemble = fastens.Ensemble(members, engine="fold")
    for seed in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            near(ensemble(x), mean_of(twins, x))
    handed_out = [ensemble.members[k] for k in range(3)]
    with torch.no_grad():
        near(mean_of(handed_out, x), mean_of(twins, x))


@pytest.mark.parametrize("make", [lambda: Forgets(3.0), lambda: Loses(3.0)], ids=["forgets", "loses"])
def test_objects_whose_copies_differ(make):
    members = members_with(make, itself)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ensemble = fastens.Ensemble(members)
    assert any("one by one" in str(each.message) for each in caught)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near(ensemble(x), mean_of(members, x))
        near(ensemble.members[1](x), members[1](x))


class Hooked(nn.Module):
    """A layer whose output a hook multiplies, and another shifts, with handles that remove them."""

    def __init__(self, which=1, number=2):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        handles = [self.inner.register_forward_hook(hook) for hook in (doubled, shifted)[:number]]
        self.handle = handles[which]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def doubled(module, args, output):
    return output * 2


def shifted(module, args, output):
    return output + 3


def test_handles_of_hooks():
    members = [Hooked() for _ in range(3)]
    ensemble = fastens.Ensemble(members, engine="fold")
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near(ensemble(x), mean_of(members, x))
        for each in (*members, ensemble.network):
            each.handle.remove()
        near(ensemble(x), mean_of(members, x))


@pytest.mark.parametrize("other", [{"which": 0}, {"which": 0, "number": 1}], ids=["another", "fewer"])
def test_handles_of_other_hooks(other):
    members = [Hooked(), Hooked(**other)]
    with pytest.raises(ValueError, match="differs from member 0"):
        fastens.Ensemble(members, engine="fold")


class Named(OrderedDict):
    """A dictionary of a class of its own."""


def with_attribute():
    table = OrderedDict()
    table.note = [1]
    return table


EMPTY = {"dict": dict, "set": set, "OrderedDict": OrderedDict, "list": list, "derived": Named, "noted": with_attribute}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_empty_containers(make):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].held = network[1].held = make()
    network[1].own = make()
    made = copied(network)
    assert made[0].held is made[1].held
    assert made[1].own is not made[0].held
    assert type(made[0].held) is type(network[0].held)
    assert vars(made[0].held) == vars(network[0].held) if hasattr(network[0].held, "__dict__") else True
    assert made[0].held is not network[0].held
    if make is with_attribute:
        assert made[0].held.note is not network[0].held.note
    assert made[0]._forward_hooks is not network[0]._forward_hooks
    assert made[0]._forward_hooks is not made[1]._forward_hooks
    made[0].register_forward_hook(print)
    assert not network[0]._forward_hooks
    assert not made[1]._forward_hooks


def test_what_the_memo_holds_is_put_in():
    network, own = nn.Linear(2, 2), {}
    network.held = {}
    assert copied(network, {id(network.held): own}).held is own
