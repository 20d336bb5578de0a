"""What others change inside of values that looped members wrote to themselves: done to all of them, or an error."""

import collections
import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastens
from tests.fold.contract import K, made, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Note:
    """An object with a number of its member's."""

    def __init__(self, value):
        self.value, self.others = value, []


class Keeps(nn.Module):
    """Keeps numbers of its weights in values of all kinds."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.layer, self.checkpointed = nn.Linear(4, 4), checkpointed
        self.past, self.recent, self.table, self.seen = [], collections.deque(maxlen=8), {"inside": []}, set()
        self.note, self.state = None, {}

    def part(self, x):
        """Remember, and compute."""
        number = float(self.layer.weight.detach()[0, 0]) + 0.1 * len(self.past)
        self.past.append(number)
        self.recent.append(number)
        self.table[len(self.past)] = number
        self.table["inside"].append(number)
        self.seen.add(round(number, 3))
        if self.note is None:
            self.note, self.state = Note(number), {"last": x.detach() * number}
        self.note.others.append(number)
        kept = [*self.past, *self.recent, *self.table["inside"], *self.seen, self.note.value, *self.note.others]
        numbers = [x for key, x in self.table.items() if key != "inside"]
        return self.layer(x) * (1 + sum(kept) + sum(numbers)) + self.state["last"].sum()

    def forward(self, x):
        """One layer."""
        return checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x)


CHANGES = {
    "appended": lambda m: m.past.append(5.0),
    "extended": lambda m: m.past.extend([5.0, 6.0]),
    "emptied": lambda m: m.past.clear(),
    "added in place": lambda m: m.past.__iadd__([7.0]),
    "item set": lambda m: m.past.__setitem__(0, 9.0),
    "deque": lambda m: m.recent.append(3.0),
    "deque emptied": lambda m: m.recent.clear(),
    "entry": lambda m: m.table.__setitem__("other", 2.0),
    "entry taken": lambda m: m.table.pop(1),
    "inside": lambda m: m.table["inside"].append(4.0),
    "inside emptied": lambda m: m.table["inside"].clear(),
    "set": lambda m: m.seen.add(8.5),
    "attribute": lambda m: setattr(m.note, "value", 2.5),
    "inside an object": lambda m: m.note.others.append(1.5),
    "two at once": lambda m: (m.past.clear(), m.table.update(a=1.0, b=2.0)),
    "set anew, changed before": lambda m: (m.past.sort(), setattr(m, "past", [1.0])),
}
UNCLEAR = {
    "sorted": lambda m: m.past.sort(reverse=True),
    "popped": lambda m: m.past.pop(0),
    "deque turned": lambda m: m.recent.rotate(1),
    "tensor": lambda m: m.state["last"].mul_(2),
    "inside, and an item set": lambda m: (lambda table: (table.update(a=1.0), table["inside"].reverse()))(m.table),
}


def both(checkpointed=False):
    members = [made(lambda _: Keeps(checkpointed), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine="loop")
    for _ in range(2):
        called(ensemble, members)
    return ensemble, members


def called(ensemble, members):
    near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_the_same_for_all_is_done_to_all(change, refreshed):
    ensemble, members = both()
    for _ in range(2):
        for each in (ensemble, *members):
            CHANGES[change](each)
        if refreshed:
            ensemble.refresh()
        for _ in range(2):
            called(ensemble, members)
        if change == "entry taken":
            break


@pytest.mark.parametrize("change", UNCLEAR)
def test_one_that_depends_on_the_members_values_is_an_error(change):
    ensemble, members = both()
    UNCLEAR[change](ensemble)
    with pytest.raises(ValueError, match="set it anew"):
        ensemble(X)
    if change != "tensor":  # which nobody kept the values of
        for _ in range(2):
            called(ensemble, members)


def test_what_was_handed_out_before_calls_is_followed_after_them():
    ensemble, members = both()
    held = [each.past for each in (ensemble, *members)]
    for _ in range(3):
        called(ensemble, members)
        for each in held:
            each.append(1.0)


class Inside(nn.Module):
    """Writes to what a block holds, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Keeps(), nn.ModuleList([Keeps()])

    def forward(self, x):
        """Both, one after the other."""
        return self.second[0](self.first(x))


PLACES = {"itself": (Keeps, lambda m: m), "block": (Inside, lambda m: m.first), "list": (Inside, lambda m: m.second[0])}
DONE = (
    *("appended", "extended", "added in place", "deque", "entry", "inside", "set", "set anew, changed before"),
    *("emptied", "deque emptied", "inside emptied", "two at once", "item set"),
)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", DONE)
def test_what_others_do_to_what_the_network_held_before_is_done_to_what_members_wrote(change, place, engine):
    build, part = PLACES[place]
    members = [made(lambda _: build(), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    held = [vars(part(each)) if each is not ensemble else vars(part(ensemble.network)) for each in (ensemble, *members)]
    held = [types.SimpleNamespace(**{n: own[n] for n in ("past", "recent", "table", "seen")}) for own in held]
    for _ in range(3):
        called(ensemble, members)
        for each, own in zip((ensemble, *members), held, strict=True):
            CHANGES[change](part(each) if change.startswith("set anew") else own)


class Twice(Keeps):
    """Has one list in two places."""

    def __init__(self):
        super().__init__()
        self.also, self.past_of = self.past, {"past": self.past}


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_is_in_several_places_is_changed_once_and_with_an_error_not_at_all(engine):
    members = [made(lambda _: Twice(), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for _ in range(3):
        called(ensemble, members)
        for each in (ensemble, *members):
            each.past_of["past"].append(1.0)
    ensemble.past.append(2.0)  # follows, once the other change is undone
    ensemble.recent.popleft()
    with pytest.raises(ValueError, match="recent was changed in place"):
        ensemble(X)
    for member in members:
        member.past.append(2.0)
    for _ in range(2):
        called(ensemble, members)


def test_what_others_cannot_do_to_what_members_wrote_is_an_error():
    members = [made(lambda _: Keeps(), k) for k in range(K)]
    for each in members:
        each.past += [2.0, 1.0]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine="loop")
    held = ensemble.past
    called(ensemble, members)
    was = list(held)
    held.sort()
    with pytest.raises(ValueError, match="past was changed in place"):
        ensemble(X)
    assert held == was == members[0].past
    for _ in range(2):
        called(ensemble, members)


def test_what_a_checkpoint_runs_again_is_no_change_of_others():
    ensemble, members = both(checkpointed=True)
    for _ in range(3):
        assert ensemble.past == members[0].past
        found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
        near(found, expected)
        found.sum().backward()
        expected.sum().backward()


def test_members_that_are_looked_at_have_the_change():
    ensemble, members = both()
    for each in (ensemble, *members):
        each.past.append(5.0)
    for mine, theirs in zip(ensemble.members, members, strict=True):
        assert mine.past == theirs.past
    ensemble.past.append(6.0)
    assert [each.past[-1] for each in copy.deepcopy(ensemble).members] == [6.0] * K


def test_what_was_handed_out_as_it_began_is_followed():
    """Emptied, members' lists are those that they began with, and are their own nevertheless."""
    ensemble, members = both()
    for each in (ensemble, *members):
        each.past.clear()
    kept = [each.past for each in (ensemble, *members)]
    called(ensemble, members)
    for past in kept:
        past.append(5.0)
    for _ in range(2):
        called(ensemble, members)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_the_ensemble_shows_what_the_first_member_wrote_at_every_depth(engine):
    members = [made(lambda _: Inside(), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    held = ensemble.first.past, ensemble.second[0].table
    for _ in range(3):
        called(ensemble, members)
        for mine, theirs in ((ensemble.first, members[0].first), (ensemble.second[0], members[0].second[0])):
            assert (mine.past, mine.table, mine.seen) == (theirs.past, theirs.table, theirs.seen)
            assert list(mine.recent) == list(theirs.recent)
            assert vars(mine.note) == vars(theirs.note)
        assert held[0] is ensemble.first.past
        assert held[1] is ensemble.second[0].table
        for mine, theirs in zip(copy.deepcopy(ensemble).members, members, strict=True):  # of which each has its own
            assert (mine.first.past, mine.second[0].table) == (theirs.first.past, theirs.second[0].table)
        ensemble = pickle.loads(pickle.dumps(ensemble)) if len(members[0].first.past) == 2 else ensemble
        held = ensemble.first.past, ensemble.second[0].table


@pytest.mark.parametrize("place", PLACES)
def test_what_is_set_to_itself_is_changed_in_place(place):
    build, part = PLACES[place]
    members = [made(lambda _: build(), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine="loop")
    for _ in range(3):
        called(ensemble, members)
        for each in (ensemble, *members):
            part(each).past += [1.5]
            part(each).seen |= {7.5}


class KeepsInput(nn.Module):
    """Keeps what it made of its first input, in a value and in a list, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.each = nn.Linear(4, 4), {}, []

    def forward(self, x):
        """One layer, and the number of the call."""
        self.first.setdefault("sine", x.sin())
        self.each.append(x.cos())
        return self.layer(x) + len(self.each)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_tensors_that_a_transform_left_in_members_are_no_error(engine, grad):
    members = [made(lambda _: KeepsInput(), k) for k in range(K)]
    ensemble, ones = fastens.Ensemble(copy.deepcopy(members), engine=engine), torch.ones_like(X)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            found = torch.func.jvp(ensemble, (X,), (ones,))
            expected = [torch.func.jvp(member, (X,), (ones,)) for member in members]
            for mine, theirs in zip(found, zip(*expected, strict=True), strict=True):
                near(mine, torch.stack(theirs).mean(0))
            for _ in range(2):
                near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))
