"""What a network's code reads outside of its modules and inside of what they hold: it is noticed where it changes."""

import os
import threading
import types
import warnings

import pytest
import torch

import fastens
from fastens import _native
from tests.fold.noticing import T, X, check_noticed, loop
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")

SOURCE = """
import contextvars, functools, os, types
import torch
from torch import nn

class Knobs:
    scale = 1.0

class Slotted:
    __slots__ = ("scale",)

SCALE = 1.0
TABLE = {{"scale": 1.0}}
ROW = [0.0, 1.0]
NESTED = {{"all": [{{"scale": 1.0}}]}}
OBJECT = types.SimpleNamespace(scale=1.0)
SLOTTED = Slotted()
SLOTTED.scale = 1.0
VARIABLE = contextvars.ContextVar("scale", default=1.0)

def made(scale):
    def read():
        return scale
    return read

CLOSURE = made(1.0)

def decorated(function):
    @functools.wraps(function)
    def around(*args):
        return function(*args)
    return around

def helper(net, h, bias=0.0):
    return h * {value} + bias

class Callable:
    def __call__(self, net, h):
        return helper(net, h)

    def method(self, net, h):
        return self(net, h)

class Base(nn.Module):
    of_class = 1.0
    table_of_class = {{"scale": 1.0}}

class Net(Base):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.row, self.object = {{"scale": 1.0}}, [1.0], types.SimpleNamespace(scale=1.0)
        self.rule = functools.partial(helper, bias=0.0)
        self.rules = [lambda net, h: helper(net, h)]
        self.callable = Callable()
        self.bound = self.callable.method

    def forward(self, x, t):
        net, h = self, self.first(x)
        return self.last(torch.tanh({way}))

    def scaled(self, h, net=None):
        net = self
        return h * {value}

    @property
    def scale(self):
        net = self
        return {value}

    @staticmethod
    def scale_of(net):
        return {value}

def nested(net, h):
    def inside():
        return h * {value}
    return inside()
"""

PLACES = {  # an expression in the code of a network, and how what it stands for is changed
    "a global": ("SCALE", lambda names, nets: names.update(SCALE=3.0)),
    "an item of a global": ('TABLE["scale"]', lambda names, nets: names["TABLE"].update(scale=3.0)),
    "an item of a list": ("ROW[-1]", lambda names, nets: names["ROW"].append(3.0)),
    "an item of an item": (
        'NESTED["all"][0]["scale"]',
        lambda names, nets: names["NESTED"]["all"][0].update(scale=3.0),
    ),
    "an attribute of a global": ("OBJECT.scale", lambda names, nets: setattr(names["OBJECT"], "scale", 3.0)),
    "a slot": ("SLOTTED.scale", lambda names, nets: setattr(names["SLOTTED"], "scale", 3.0)),
    "another object": ("OBJECT.scale", lambda names, nets: names.update(OBJECT=types.SimpleNamespace(scale=3.0))),
    "a class": ("Knobs.scale", lambda names, nets: setattr(names["Knobs"], "scale", 3.0)),
    "the network's class": ("net.of_class", lambda names, nets: setattr(names["Net"], "of_class", 3.0)),
    "its base": ("type(net).of_class", lambda names, nets: setattr(names["Base"], "of_class", 3.0)),
    "by getattr": ('getattr(net, "of_class", 2.0)', lambda names, nets: setattr(names["Base"], "of_class", 3.0)),
    "an item of its class": (
        'net.table_of_class["scale"]',
        lambda names, nets: names["Base"].table_of_class.update(scale=3.0),
    ),
    "a context variable": ("VARIABLE.get()", lambda names, nets: names["VARIABLE"].set(3.0)),
    "a closure": (
        "CLOSURE()",
        lambda names, nets: setattr(names["CLOSURE"].__closure__[0], "cell_contents", 3.0),
    ),
    "the environment": (
        'float(os.environ.get("FASTENS_TEST_SCALE", 1))',
        lambda *_: os.environ.update(FASTENS_TEST_SCALE="3"),
    ),
    "the environment, asked": (
        'float(os.getenv("FASTENS_TEST_SCALE", 1))',
        lambda *_: os.environ.update(FASTENS_TEST_SCALE="3"),
    ),
    "a held dictionary": ('net.table["scale"]', lambda names, nets: [net.table.update(scale=3.0) for net in nets]),
    "a held list": ("net.row[-1]", lambda names, nets: [net.row.append(3.0) for net in nets]),
    "a held object": ("net.object.scale", lambda names, nets: [setattr(net.object, "scale", 3.0) for net in nets]),
}

WAYS = {  # of the code to the expression
    "itself": "h * {value}",
    "a method": "self.scaled(h)",
    "a property": "h * self.scale",
    "a static method": "h * self.scale_of(self)",
    "a function": "helper(self, h)",
    "a function in a function": "nested(self, h)",
    "a function that is wrapped": "decorated(helper)(self, h)",
    "a partial function": "self.rule(self, h)",
    "a lambda in a list": "self.rules[0](self, h)",
    "an object that is called": "self.callable(self, h)",
    "a bound method": "self.bound(self, h)",
}


def network(place, way):
    """The module of Python's in which there is such a network, by its names."""
    value = PLACES[place][0]
    names = {"__name__": "of_a_user"}
    exec(SOURCE.format(value=value, way=WAYS[way].format(value=value)), names)
    return names


def members_of(names):
    torch.manual_seed(0)
    return [names["Net"]() for _ in range(3)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("FASTENS_TEST_SCALE", "1")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_a_change_is_noticed_at_the_next_call(place, way):
    names = network(place, way)
    check_noticed(members_of(names), lambda nets: PLACES[place][1](names, nets))


def test_what_is_not_read_changes_no_plan():
    names = network("a global", "a function")
    ensemble = fastens.Ensemble(members_of(names)).eval()
    with torch.no_grad():
        ensemble(X, T)
        (entry,) = ensemble._engine.plans.entries
        names["TABLE"]["scale"] = names["OBJECT"].scale = names["Knobs"].scale = 3.0
        ensemble(X, T)
        ensemble.eval()
        ensemble(X, T)
        assert ensemble._engine.plans.entries == [entry]
        assert entry.calls == 3


def test_code_that_is_led_elsewhere_is_followed():
    """A held object is replaced by one whose code reads another global."""
    names = network("a global", "an object that is called")
    exec("FACTOR = 1.0\nclass Other:\n    def __call__(self, net, h):\n        return h * FACTOR", names)
    members = members_of(names)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        assert relative_error(ensemble(X, T), loop(members)) < 1e-6
        for module in (*members, ensemble):
            module.callable = names["Other"]()
        assert relative_error(ensemble(X, T), loop(members)) < 1e-6
        before = ensemble(X, T)
        names["FACTOR"] = 3.0
        assert relative_error(ensemble(X, T), loop(members)) < 1e-6
        assert (ensemble(X, T) - before).abs().max() > 1e-2


def test_threads_that_see_other_values():
    """Context variables differ between threads: each gets the answer of its own."""
    names = network("a context variable", "a function")
    members = members_of(names)
    ensemble = fastens.Ensemble(members)
    expected, wrong = {}, []
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0, 4.0):
            names["VARIABLE"].set(scale)
            expected[scale] = loop(members)

    def calls(scale):
        names["VARIABLE"].set(scale)
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if (ensemble(X, T) - expected[scale]).abs().max() > 1e-5)

    threads = [threading.Thread(target=calls, args=(scale,)) for scale in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


HELD = [place for place in PLACES if place.startswith("a held")]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", ["itself", "a bound method"])
@pytest.mark.parametrize("place", HELD)
def test_looped_members_have_what_is_inside_now(place, way, grad):
    names = network(place, way)
    members = members_of(names)
    ensemble = fastens.Ensemble(members, engine="loop")
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert relative_error(ensemble(X, T), loop(members)) < 1e-6
        PLACES[place][1](names, [*members, ensemble])
        for _ in range(2):
            assert relative_error(ensemble(X, T), loop(members)) < 1e-6


@pytest.mark.parametrize("place", HELD)
def test_members_that_were_handed_in_are_no_oracle_of_what_is_inside_since(place):
    names = network(place, "itself")
    members = members_of(names)
    ensemble = fastens.Ensemble(members)
    PLACES[place][1](names, [ensemble])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ensemble(X, T)
    PLACES[place][1](names, members)
    assert relative_error(found, loop(members)) < 1e-6
