"""Objects that looped members have in several places, and put elsewhere: the network shows the first member's so."""

import collections
import copy
import pickle
from random import Random

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import K, made, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
NAMES = "abcd"


class Note:
    """An object that holds others."""

    def __init__(self, inside):
        self.inside = inside


def holders(member):
    """What holds objects: the dictionary of attributes, and those inside."""
    found = [vars(member)]
    for name in NAMES:
        value = vars(member).get(name)
        if isinstance(value, dict):
            found.append(value)
        elif isinstance(value, Note):
            found.append(vars(value))
    return found


def put(member, draw, value):
    draw.choice(holders(member))[draw.choice(NAMES)] = value


def held(member, draw):
    return vars(member).get(draw.choice(NAMES), 0.5)


def add_to(target, value):
    """Write to it in place."""
    if isinstance(target, list | collections.deque):
        target.append(value)
    elif isinstance(target, dict):
        target["b"] = value
    elif isinstance(target, Note):
        target.inside = value
    elif isinstance(target, set):
        target.add(value)


STEPS = {  # of a member: what it does to itself, by a number of its own
    "a new list": lambda m, draw, v: put(m, draw, [v]),
    "a new deque": lambda m, draw, v: put(m, draw, collections.deque([v], maxlen=4)),
    "a new dictionary": lambda m, draw, v: put(m, draw, {"a": v}),
    "a new set": lambda m, draw, v: put(m, draw, {v}),
    "a new object": lambda m, draw, v: put(m, draw, Note(v)),
    "what is elsewhere": lambda m, draw, v: put(m, draw, held(m, draw)),
    "an object of what is elsewhere": lambda m, draw, v: put(m, draw, Note(held(m, draw))),
    "a list of what is elsewhere": lambda m, draw, v: put(m, draw, [held(m, draw), v]),
    "in place": lambda m, draw, v: add_to(held(m, draw), v),
    "in place again": lambda m, draw, v: add_to(held(m, draw), v),
    "no more": lambda m, draw, v: vars(m).pop(draw.choice("bcd"), None),
}


class Member(nn.Module):
    """Has one list in two places, and does to itself what is drawn: the same in every member, with its own numbers."""

    def __init__(self, seed):
        super().__init__()
        self.layer, self.seed, self.calls = nn.Linear(4, 4), seed, 0
        self.a = [1.5]
        self.b, self.c = self.a, {"a": self.a}

    def forward(self, x):
        """One layer, and the sum of all numbers that it has."""
        self.calls += 1
        draw, y = Random(f"{self.seed} {self.calls}"), self.layer(x)
        for _ in range(draw.randint(0, 3)):
            STEPS[draw.choice(list(STEPS))](self, draw, round(float(y.detach().sum()), 3))
        return y + 0.01 * sum(x for x in shape_of(self) if isinstance(x, float))


def shape_of(member):
    """All that the places hold, in order, and where that is an object which was there before, which one."""
    seen, found, waiting = {}, [], [vars(member).get(name) for name in NAMES]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, list | collections.deque | dict | set | Note):
            if id(value) in seen:
                found.append(f"as {seen[id(value)]}")
                continue
            seen[id(value)] = len(seen)
            found.append(type(value).__name__)
            inside = vars(value) if isinstance(value, Note) else value
            waiting += [*inside, *inside.values()] if isinstance(inside, dict) else sorted(inside, key=str)
            waiting.append("end")
        else:
            found.append(value)
    return found


def same_shape(one, other):
    mine, theirs = shape_of(one), shape_of(other)
    assert len(mine) == len(theirs), (mine, theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a == (pytest.approx(b, abs=2e-3) if isinstance(b, float) else b), (mine, theirs)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("seed", range(20))
def test_the_network_shows_one_object_for_one_of_the_first_members(seed, engine):
    members = [made(lambda _: Member(seed), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    kept = None
    for call in range(6):
        near(ensemble(X), torch.stack([member(X) for member in members]).mean(0), 1e-3)
        same_shape(ensemble.network, members[0])
        for k, member in enumerate(members):
            same_shape(ensemble.members[k], member)
        for name in NAMES if kept else ():  # what was handed out before is where it is in the member
            assert [kept[0] is vars(members[0]).get(name)] == [kept[1] is getattr(ensemble, name, None)], name
        name = Random(f"{seed} {call} kept").choice(NAMES)
        value = vars(members[0]).get(name)
        kept = (value, getattr(ensemble, name)) if isinstance(value, list | dict | Note) else None
        if call == 3:
            ensemble = pickle.loads(pickle.dumps(copy.deepcopy(ensemble)))
            kept = None


class Grows(nn.Module):
    """Keeps numbers of its own: in the list that it has, or in a new one."""

    def __init__(self, anew):
        super().__init__()
        self.layer, self.anew = nn.Linear(4, 4), anew
        self.past, self.other, self.table = [1.5], [2.5], {"past": [3.5]}

    def forward(self, x):
        """One layer, and the sum of what it kept."""
        y = self.layer(x) + 0.1 * sum(self.past) + 0.01 * sum(self.other) + 0.2 * sum(self.table["past"])
        number = [float(y.detach().sum()) / 10]
        if self.anew:
            self.past, self.table = self.past + number, {"past": self.table["past"] + number}
        else:
            self.past += number
            self.table["past"] += number
        return y


GIVEN = {
    "an attribute": lambda each: setattr(each, "other", each.past),
    "what is inside of one": lambda each: setattr(each, "other", each.table["past"]),
    "in a dictionary": lambda each: setattr(each, "table", {"past": each.past, "more": each.table}),
    "a copy of the same numbers": lambda each: setattr(each, "other", [1.5, *[0.0] * 2]),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("anew", [False, True], ids=["in place", "anew"])
@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)
def test_what_others_put_elsewhere_is_each_members_own(give, anew, engine):
    members = [made(lambda _: Grows(anew), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for call in range(6):
        near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))
        for name in ("past", "other"):
            assert getattr(ensemble, name) == pytest.approx(getattr(members[0], name), abs=1e-4)
        assert (ensemble.other is ensemble.past) is (members[0].other is members[0].past)
        if call in (1, 3):
            for each in (ensemble, *members):
                give(each)
