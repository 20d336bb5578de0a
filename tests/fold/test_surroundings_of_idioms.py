"""Ways of code to what is outside of its modules: what Python calls unnamed, imports, names that come later."""

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from tests.fold.noticing import T, X, check_noticed, loop
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")

SOURCE = """
import array, collections, functools, threading, types, weakref
import numpy
import torch
from torch import nn

class Base(nn.Module):
    of_base = 1.0

{before}

class Net(Base):
    of_base = 2.0

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        h = self.first(x)
        {first}
        return self.last(torch.tanh(h * {value}))

    def times(self, factor):
        return SCALE * factor

    scaled = functools.partialmethod(times, 1.0)
"""
READER = "SCALE = 1.0\nclass Reader:\n    def {method}: {body}\nREADER = Reader()"
KEEPER = "class Keeper:\n    def __init__(self): self.kept = 1.0\n    def {method}: return {body}\nKEEPER = Keeper()"
ELSEWHERE = "fastens_test_elsewhere"


def assigned(owner, name):
    """Set an attribute of what a name stands for."""
    return lambda names: setattr(names[owner], name, 3.0)


def rebound(names):
    names["SCALE"] = 3.0


def item_set(names):
    names["A"][-1] = 3


IDIOMS: dict[
    str, tuple[str, str, str, Any]
] = {  # code before the class, in front of the value, and the value; and how what it stands for is changed
    "an attribute over one of the class": ("class C:\n    x = 1.0\nO = C()", "", "O.x", assigned("O", "x")),
    "an attribute that is missing": ("class C: pass\nO = C()", "", 'getattr(O, "x", 1.0)', assigned("O", "x")),
    "a slot that is empty": (
        'class C:\n    __slots__ = ("x",)\nO = C()',
        "",
        'getattr(O, "x", 1.0)',
        assigned("O", "x"),
    ),
    "an attribute of the class that is missing": ("", "", 'getattr(self, "x", 1.0)', assigned("Net", "x")),
    "a global that is missing": ("", "", 'globals().get("SCALE", 1.0)', rebound),
    "super()": ("", "", "super().of_base", assigned("Base", "of_base")),
    "an import": ("", f"import {ELSEWHERE} as e", "e.x", lambda names: setattr(sys.modules[ELSEWHERE], "x", 3.0)),
    "from an import": ("", f"from {ELSEWHERE} import x", "x", lambda names: setattr(sys.modules[ELSEWHERE], "x", 3.0)),
    "an item by code": (
        KEEPER.format(method="__getitem__(self, key)", body="self.kept"),
        "",
        "KEEPER[0]",
        assigned("KEEPER", "kept"),
    ),
    "an attribute by code": (
        KEEPER.format(method="__getattr__(self, name)", body="self.kept"),
        "",
        "KEEPER.x",
        assigned("KEEPER", "kept"),
    ),
    "a product": (
        KEEPER.format(method="__rmul__(self, h)", body="h * self.kept"),
        "",
        "KEEPER",
        assigned("KEEPER", "kept"),
    ),
    "a context": (
        READER.format(method="__enter__(self)", body="return SCALE\n    def __exit__(self, *error): pass"),
        "with READER as value: pass",
        "value",
        rebound,
    ),
    "an object made in the call": (
        READER.format(method="__init__(self)", body="self.made = SCALE"),
        "",
        "Reader().made",
        rebound,
    ),
    "a descriptor": (
        KEEPER.format(method="__get__(self, owner, kind)", body="self.kept") + "\nBase.kept_there = KEEPER",
        "",
        "self.kept_there",
        assigned("KEEPER", "kept"),
    ),
    "a partial method": ("SCALE = 1.0", "", "self.scaled()", rebound),
    "a single dispatch": (
        "SCALE = 1.0\n@functools.singledispatch\ndef of(x): pass\n@of.register\ndef _(x: float): return SCALE",
        "",
        "of(1.0)",
        rebound,
    ),
    "an attribute of a function": ("def of(): return of.x\nof.x = 1.0", "", "of()", assigned("of", "x")),
    "another user's dictionary": (
        "D = collections.UserDict(x=1.0)",
        "",
        'D["x"]',
        lambda names: names["D"].update(x=3.0),
    ),
    "a chain of dictionaries": (
        "D = collections.ChainMap(dict(x=1.0))",
        "",
        'D["x"]',
        lambda names: names["D"].update(x=3.0),
    ),
    "a proxy of a dictionary": (
        "D = dict(x=1.0)\nP = types.MappingProxyType(D)",
        "",
        'P["x"]',
        lambda names: names["D"].update(x=3.0),
    ),
    "what a thread has": ("LOCAL = threading.local()\nLOCAL.x = 1.0", "", "LOCAL.x", assigned("LOCAL", "x")),
    "a weak reference": ("class C:\n    x = 1.0\nO = C()\nW = weakref.ref(O)", "", "W().x", assigned("O", "x")),
    "a pattern": (
        "O = types.SimpleNamespace(x=1.0)",
        "match O:\n            case types.SimpleNamespace(x=value): pass",
        "value",
        assigned("O", "x"),
    ),
    "the class of another network": (
        "class Other(nn.Module):\n    x = 1.0\n    def forward(self, h): return h * self.x\nOTHER = Other()",
        "h = OTHER(h)",
        "1.0",
        assigned("Other", "x"),
    ),
    "an array": ("A = numpy.ones(2)", "", "float(A[1])", item_set),
    "a matrix of another order": ("A = numpy.ones((2, 2)).T", "", "float(A[1, 0])", item_set),
    "an array of objects": ("A = numpy.array([1.0, None, 1.0], dtype=object)", "", "A[2]", item_set),
    "an array of Python's": ('A = array.array("d", [1.0, 1.0])', "", "A[1]", item_set),
    "bytes": ('A = bytearray(b"\\x01\\x01")', "", "A[1]", item_set),
    "a view of an array": ("A = numpy.ones(2)\nV = A[1:]", "", "float(V[0])", item_set),
    "the default of a context variable": (
        'import contextvars\nO = types.SimpleNamespace(x=1.0)\nV = contextvars.ContextVar("v", default=O)',
        "",
        "V.get().x",
        assigned("O", "x"),
    ),
    "a context variable of none": (
        'import contextvars\nV = contextvars.ContextVar("v", default=1.0)',
        "",
        "(V.get() or 3.0)",
        lambda names: names["V"].set(None),
    ),
    "the environment by another name": (
        "from os import environ as E",
        "",
        'float(E["FASTENS_TEST_SCALE"])',
        lambda names: names["E"].update(FASTENS_TEST_SCALE="3"),
    ),
    "the environment, asked by another name": (
        "import os\nask = os.getenv",
        "",
        'float(ask("FASTENS_TEST_SCALE"))',
        lambda names: names["os"].environ.update(FASTENS_TEST_SCALE="3"),
    ),
    "a dictionary of weak references": (
        "class C: pass\nO, P = C(), C()\nO.x, P.x = 1.0, 3.0\nD = weakref.WeakValueDictionary(x=O)",
        "",
        'D["x"].x',
        lambda names: names["D"].update(x=names["P"]),
    ),
    "the value of an enumeration": (
        "import enum\nclass C(enum.Enum):\n    x = [1.0]",
        "",
        "C.x.value[-1]",
        lambda names: names["C"].x.value.append(3.0),
    ),
    "all that an object has": ("class C: pass\nO = C()\nO.y = 1.0", "", "sum(vars(O).values())", assigned("O", "y")),
    "what comes to an object": ("O = types.SimpleNamespace()", "", "sum(O.__dict__.values(), 1.0)", assigned("O", "y")),
    "a function that an object has": (
        "O = types.SimpleNamespace(of=lambda: 1.0)",
        "",
        "O.of()",
        lambda names: setattr(names["O"], "of", lambda: 3.0),
    ),
}


def network(before, first, value):
    names: dict[str, Any] = {"__name__": "of_a_user"}
    exec(SOURCE.format(before=before, first=first or "pass", value=value), names)
    torch.manual_seed(0)
    return names, [names["Net"]() for _ in range(3)]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    module = types.ModuleType(ELSEWHERE)
    vars(module)["x"] = 1.0
    monkeypatch.setitem(sys.modules, ELSEWHERE, module)
    monkeypatch.setenv("FASTENS_TEST_SCALE", "1")


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_change_is_noticed_at_the_next_call(idiom):
    before, first, value, change = IDIOMS[idiom]
    names, members = network(before, first, value)
    check_noticed(members, lambda nets: change(names))


class Tabled(nn.Module):
    """Reads an array of its own, or of what it holds."""

    def __init__(self, hold):
        super().__init__()
        self.first, self.last, self.held = nn.Linear(4, 4), nn.Linear(4, 4), hold(np.ones(3, np.float32))

    def forward(self, x, t):
        """The table as a number."""
        held = self.held
        table = held["table"] if isinstance(held, dict) else held.table if hasattr(held, "table") else held
        return self.last(torch.tanh(self.first(x) * float(table[1])))


@pytest.mark.parametrize("hold", [lambda a: a, lambda a: {"table": a}, lambda a: types.SimpleNamespace(table=a)])
def test_an_array_that_members_hold_is_followed(hold):
    members = [Tabled(hold) for _ in range(3)]

    def change(nets):
        for net in nets:
            held = net.held
            (held["table"] if isinstance(held, dict) else getattr(held, "table", held))[1] = 3.0

    check_noticed(members, change)


HARMLESS: dict[str, tuple[str, str, str, Callable[..., Any]]] = {  # what changes with each call, and no code reads it
    "a global named as a method": ("", "h = h.t().t()", "1.0", lambda names, n: names.update(t=n)),
    "a global named as a text": ("", 'h = {"x0": h}["x0"]', "1.0", lambda names, n: names.update(x0=n)),
    "attributes of other names": (
        "O = types.SimpleNamespace(x=1.0)",
        "",
        "O.x",
        lambda names, n: setattr(names["O"], f"other_{n}", n),
    ),
}


@pytest.mark.parametrize("place", HARMLESS)
def test_what_no_code_reads_changes_no_plan(place):
    before, first, value, change = HARMLESS[place]
    names, members = network(before, first, value)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for n in range(5):
            change(names, n + 1000.5)
            ensemble(X, T)
    (entry,) = ensemble._engine.plans.entries
    assert entry.calls == 5


ODD = {  # objects that raise what they like where they are asked for anything
    "slots": "class C:\n    __slots__ = ()\n    def __getattr__(self, name): raise KeyError(name)\nO = C()",
    "a module": "class M(types.ModuleType):\n    def __getattr__(self, name): raise ImportError(name)\nO = M('odd')",
    "a module without a name": "O = types.ModuleType('odd')\ndel O.__dict__['__name__']",
    "a class of no module": "class C:\n    __module__ = None\nO = C()",
    "a property": "class C:\n    @property\n    def shape(self): raise RuntimeError\nO = C()",
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_objects_are_left_alone(odd):
    _, members = network(ODD[odd], "O, h.shape", "1.0")
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(ensemble(X, T), loop(members)) < 1e-6
    (entry,) = ensemble._engine.plans.entries
    assert entry.calls == 2
