"""What all members draw from or write to, in arguments and outside of them: tried calls leave it as it was."""

import collections
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import relative_error

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network that does something with its argument, where its input is large."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use

    def forward(self, x, given=None):
        h = self.layer(x)
        return self.use(h, given) if float(x.max()) > 3 else h


def appended(h, given):
    given.append(1)
    return h * len(given)


def counted(h, given):
    given.count += 1
    return h * given.count


def added(h, given):
    given["x"].add_(1)
    return h + given["x"]


ARGUMENTS = {  # what makes one, and what the network does with it
    "torch": (lambda: torch.Generator().manual_seed(1), lambda h, g: h + torch.randn(h.shape, generator=g)),
    "Python": (lambda: random.Random(1), lambda h, g: h * (1 + g.random())),
    "NumPy": (lambda: np.random.default_rng(1), lambda h, g: h * (1 + g.random())),
    "a queue": (collections.UserList, appended),
    "an object": (lambda: types.SimpleNamespace(count=0), counted),
    "a tensor that is hidden": (lambda: collections.UserDict(x=torch.zeros(4)), added),
}
OUTSIDE = {  # generators by which name, and the numbers that the network draws
    "torch": (lambda: torch.Generator().manual_seed(1), "torch.randn(h.shape, generator=rng)"),
    "Python": (lambda: random.Random(1), "rng.random()"),
    "NumPy": (lambda: np.random.default_rng(1), "rng.random()"),
    "of old": (lambda: np.random.RandomState(1), "float(rng.rand())"),
}
SOURCE = """
class Net(nn.Module):
    {of_class}
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x{default}):
        h = self.layer(x)
        {first}
        return h + {drawn}
"""
PLACES = {
    "global": {"of_class": "", "default": "", "first": ""},
    "class": {"of_class": "rng = RNG", "default": "", "first": "rng = self.rng"},
    "default": {"of_class": "", "default": ", rng=RNG", "first": ""},
}


def looped(members, x, *given):
    return torch.stack([member(x, *given) for member in members]).mean(0)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_argument_of_which_there_is_one_is_used_as_by_the_loop(kind, late):
    make, use = ARGUMENTS[kind]
    torch.manual_seed(0)
    members = [Net(use) for _ in range(3)]
    ensemble, scales = fastens.Ensemble(members), (1, 1, 9, 1, 9) if late else (9, 9, 9)
    own, theirs = make(), make()
    with torch.no_grad():
        for scale in scales:
            expected = looped(members, scale * X, theirs)
            assert relative_error(ensemble(scale * X, own), expected) < 1e-5
    assert ensemble.engine == "loop"


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("kind", ["torch", "Python", "a queue", "a tensor that is hidden"])
def test_rows_with_members_use_it_as_their_loop(kind):
    make, use = ARGUMENTS[kind]
    torch.manual_seed(0)
    members = [Net(use) for _ in range(3)]
    ensemble, own, theirs = fastens.Ensemble(members), make(), make()
    with torch.no_grad(), ensemble.assigned([0, 2]):
        for _ in range(3):
            first, second = (members[k](9 * X, theirs) for k in (0, 2))
            assert relative_error(ensemble(9 * X, own), torch.stack([first[0], second[1]])) < 1e-5


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_generator_outside_of_members_is_drawn_from_as_by_the_loop(kind, place):
    make, drawn = OUTSIDE[kind]
    rng = make()
    names = {"__name__": "of_a_user", "nn": nn, "torch": torch, "rng": rng, "RNG": rng}
    exec(SOURCE.format(drawn=drawn, **{**PLACES[place], "first": PLACES[place]["first"] or "pass"}), names)
    torch.manual_seed(0)
    members = [names["Net"]() for _ in range(3)]
    other = make()

    def put_back():
        if kind == "torch":
            rng.set_state(other.get_state())
        elif kind == "Python":
            rng.setstate(other.getstate())
        elif kind == "NumPy":
            rng.bit_generator.state = other.bit_generator.state
        else:
            rng.set_state(other.get_state())

    with torch.no_grad():
        expected = [looped(members, X) for _ in range(3)]
        put_back()
        ensemble = fastens.Ensemble(members)
        for each in expected:
            assert relative_error(ensemble(X), each) < 1e-5
