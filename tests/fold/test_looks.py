"""What lists, dictionaries and classes hold is the same objects, or a change is told: by the library as by Python."""

import collections
import functools
import threading
import types

import pytest

from fastens import _native
from fastens.network import looks
from fastens.network.contents import looks_inside
from fastens.network.looks import Looks, named, values_of


class Owner:
    """A class and its object, with names."""

    first, second = [1.5], [2.5]

    def __init__(self):
        self.value, self.other = [3.5], [4.5]


class Names(dict):
    """A dictionary that answers otherwise."""

    def __getitem__(self, name):
        return super().get(name)


def made():
    """One of everything that is looked at, by name."""
    return types.SimpleNamespace(
        items=[[0.5], [1.5], [2.5]],
        table={"a": [0.5], "b": [1.5], 3: [2.5]},
        ordered=collections.OrderedDict(a=[0.5], b=[1.5]),
        derived=Names(a=[0.5], b=[1.5]),
        owner=Owner(),
        kind=type("Kind", (Owner,), {"first": [0.5], "third": [1.5]}),
    )


def looked_at(held):
    """Looks at all of it."""
    inside = looks_inside([held.items, held.table, held.ordered, held.derived])
    return Looks(
        [
            *inside,
            named(vars(held.owner), ["value"]),
            named(vars(held.kind), ["first", "third"]),
            values_of(vars(held.owner)),
            named(held.derived, ["a"]),
        ]
    )


CHANGES = {
    "an item": lambda held: held.items.__setitem__(1, [1.5]),
    "an item inside": lambda held: held.items[1].append(1),
    "one more": lambda held: held.items.append(0),
    "one less": lambda held: held.items.pop(),
    "another order": lambda held: held.items.reverse(),
    "a value": lambda held: held.table.__setitem__("b", [1.5]),
    "a key": lambda held: held.table.__setitem__("c", held.table.pop("b")),
    "one key for another": lambda held: held.table.__setitem__("c", held.table.pop(3)),
    "order of keys": lambda held: held.table.__setitem__("a", held.table.pop("a")),
    "order of an ordered one": lambda held: held.ordered.move_to_end("a"),
    "a value of an ordered one": lambda held: held.ordered.__setitem__("a", [0.5]),
    "a value of a derived one": lambda held: dict.__setitem__(held.derived, "a", [0.5]),
    "empty": lambda held: held.table.clear(),
    "an attribute": lambda held: setattr(held.owner, "value", [3.5]),
    "another attribute": lambda held: setattr(held.owner, "more", 1),
    "no attribute": lambda held: delattr(held.owner, "value"),
    "an attribute of a class": lambda held: setattr(held.kind, "first", [0.5]),
    "none of a class": lambda held: delattr(held.kind, "third"),
}


@pytest.fixture(params=["library", "python"])
def by(request, monkeypatch):
    """Who looks."""
    if request.param == "library" and not _native.load():
        pytest.skip(f"no compiled library: {_native.status()}")
    if request.param == "python":
        monkeypatch.setattr(_native, "functions", lambda: None)
    return request.param


@pytest.mark.parametrize("asked", [0, 1, looks._OFTEN, 2 * looks._OFTEN])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_told(change, asked, by):
    held = made()
    found = looked_at(held)
    assert all(found.same() for _ in range(asked))
    assert (found._known[0] is not None) == (by == "library" and asked >= looks._OFTEN)
    change(held)
    assert not found.same()
    assert not found.same()


@pytest.mark.parametrize("asked", [1, 2 * looks._OFTEN])
def test_what_was_there_before_holds_again(asked, by):
    held = made()
    found = looked_at(held)
    assert all(found.same() for _ in range(asked))
    value = held.items[1]
    held.items[1] = [1.5]
    assert not found.same()
    held.items[1] = value
    assert found.same()
    held.kind.fourth = 1  # which is not looked at
    assert found.same()


def test_another_object_is_no_old_one_by_its_address(by):
    """What was looked at stays, so that nothing new has its place in memory."""
    held = {"a": object()}
    found = Looks([values_of(held)])
    assert all(found.same() for _ in range(5))
    for _ in range(1000):
        held["a"] = None
        held["a"] = object()
        assert not found.same()


def test_nothing_is_missed_by_threads_that_look_at_once(by):
    """A change that comes while one of them leaves the question to the library is a change."""
    for _ in range(50):
        held = made()
        found = looked_at(held)
        start = threading.Barrier(4)

        def look(start=start, found=found):
            start.wait()
            for _ in range(20):
                found.same()

        def change(start=start, held=held):
            start.wait()
            held.items[1] = [1.5]

        threads = [threading.Thread(target=act) for act in (look, look, look, change)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not found.same()


def test_what_the_library_does_not_know_is_looked_at_by_python(by):
    cell = (lambda x: lambda: x)([1.5]).__closure__[0]
    held = {"a": [0.5]}
    found = Looks([values_of(held), functools.partial(lambda c: (c.cell_contents,), cell), named(Names(a=1), ["a"])])
    assert all(found.same() for _ in range(5))
    cell.cell_contents = [1.5]
    assert not found.same()
