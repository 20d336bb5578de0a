"""Members that differ in anything but their tensors run each by its own Python; state that they write is their own."""

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import random
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, K, averaged, batch, made, near

VECTORS = batch(5, 4)


class Keeps(nn.Module):
    """Multiplies by a number that it finds in what it keeps."""

    def __init__(self, kept, find):
        super().__init__()
        self.inner, self.kept, self.find = nn.Linear(4, 4), kept, find

    def forward(self, x):
        return self.inner(x) * self.find(self.kept)


@dataclasses.dataclass
class Settings:
    gain: float


class Level(enum.Enum):
    LOW = 1
    MIDDLE = 2
    HIGH = 3


class Slotted:
    __slots__ = ("gain",)

    def __init__(self, gain):
        self.gain = gain


class Called:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self):
        return self.gain

    def method(self):
        return self.gain


Pair = collections.namedtuple("Pair", "name gain")


def given(gain, other=1):
    return gain * other


def closure(gain):
    return lambda: gain


def deep_closure(gain):
    inner = closure(gain)
    return lambda: inner()


def default(gain):
    def function(gain=gain):
        return gain

    return function


def attributed(gain):
    def function():
        return vars(function)["gain"]

    vars(function)["gain"] = gain
    return function


def own_class(gain):
    return type("Own", (), {"gain": gain})


def with_property(gain):
    return type("Own", (), {"gain": property(lambda self: gain)})()


def attribute(kept):
    return kept.gain


def itself(kept):
    return kept


def called(kept):
    return kept()


def first(kept):
    return next(iter(kept))


REFERENCES = [Called(float(k + 1)) for k in range(K)]

# What member k keeps, by its number, and how the number is found in it.
KEPT = {
    "float": (float, itself),
    "int": (int, itself),
    "bool": (lambda v: v > 1, lambda kept: 2 if kept else 3),
    "string": (lambda v: "x" * int(v), len),
    "bytes": (lambda v: bytes([int(v)]), first),
    "none": (lambda v: None if v == 1 else v, lambda kept: kept or 1),
    "list": (lambda v: [v], first),
    "tuple": (lambda v: (v, 1), first),
    "named tuple": (lambda v: Pair("a", v), attribute),
    "dict": (lambda v: {"gain": v}, lambda kept: kept["gain"]),
    "keys of a dict": (lambda v: {v: 0}, first),
    "order of a dict": (lambda v: dict([("a", 2), ("b", 3)][:: -1 if v > 1 else 1]), lambda kept: first(kept.values())),
    "default dict": (lambda v: collections.defaultdict(closure(v)), lambda kept: kept.default_factory()),
    "user dict": (lambda v: collections.UserDict(gain=v), lambda kept: kept["gain"]),
    "proxy": (lambda v: types.MappingProxyType({"gain": v}), lambda kept: kept["gain"]),
    "chain map": (lambda v: collections.ChainMap({"gain": v}), lambda kept: kept["gain"]),
    "counter": (lambda v: collections.Counter("a" * int(v)), lambda kept: kept["a"]),
    "deque": (lambda v: collections.deque([v]), first),
    "length of a deque": (lambda v: collections.deque([1.0], maxlen=int(v)), lambda kept: kept.maxlen),
    "set": (lambda v: {v}, first),
    "frozen set": (lambda v: frozenset([v]), first),
    "nested": (lambda v: {"a": [(1, {"gain": Settings(v)})]}, lambda kept: kept["a"][0][1]["gain"].gain),
    "dataclass": (Settings, attribute),
    "slots": (Slotted, attribute),
    "namespace": (lambda v: types.SimpleNamespace(gain=v), attribute),
    "module": (lambda v: module_of(v), attribute),
    "numpy scalar": (np.float64, float),
    "numpy array": (lambda v: np.array([1.0, v]), lambda kept: float(kept[1])),
    "numpy array of objects": (lambda v: np.array([v, None], dtype=object), lambda kept: kept[0]),
    "array": (lambda v: array.array("d", [v]), first),
    "bytearray": (lambda v: bytearray([int(v)]), first),
    "enum": (lambda v: list(Level)[int(v) - 1], lambda kept: kept.value),
    "complex": (lambda v: complex(1, v), lambda kept: kept.imag),
    "fraction": (lambda v: fractions.Fraction(int(v), 2), float),
    "decimal": (lambda v: decimal.Decimal(int(v)), float),
    "time": (lambda v: datetime.timedelta(int(v)), lambda kept: kept.days),
    "range": (lambda v: range(int(v), 9), first),
    "slice": (lambda v: slice(int(v)), lambda kept: kept.stop),
    "torch function": (lambda v: [torch.relu, torch.tanh, torch.sin][int(v) - 1], lambda kept: kept(torch.ones(()))),
    "dtype": (lambda v: [torch.float32, torch.float64, torch.int8][int(v) - 1], lambda kept: kept.itemsize),
    "device": (lambda v: torch.device("cpu", int(v) - 1), lambda kept: kept.index + 1),
    "size": (lambda v: torch.Size([int(v)]), first),
    "partial": (lambda v: functools.partial(given, v), called),
    "keyword of a partial": (lambda v: functools.partial(given, 2, other=v), called),
    "closure": (closure, called),
    "closure of a closure": (deep_closure, called),
    "default": (default, called),
    "attribute of a function": (attributed, called),
    "cached function": (lambda v: functools.lru_cache(closure(v)), called),
    "callable": (Called, called),
    "method": (lambda v: Called(v).method, called),
    "class": (own_class, attribute),
    "property of a class": (with_property, attribute),
    "weak reference": (lambda v: weakref.ref(REFERENCES[int(v) - 1]), lambda kept: kept().gain),
    "iterator": (lambda v: itertools.count(int(v)), lambda kept: float(repr(kept)[6:-1])),
    "generator": (lambda v: random.Random(int(v)), lambda kept: random_of(kept)),
    "numpy generator": (lambda v: np.random.default_rng(int(v)), lambda kept: random_of(kept)),
    "tensor": (torch.tensor, itself),
    "tensors in a list": (lambda v: [torch.ones(()), torch.tensor(v)], lambda kept: kept[1]),
    "tensors in a dict": (lambda v: {"gain": torch.tensor(v)}, lambda kept: kept["gain"]),
    "tensor in a dataclass": (lambda v: Settings(torch.tensor(v)), attribute),
    "tensor in a closure": (lambda v: closure(torch.tensor(v)), called),
    "module in a list": (lambda v: [own_layer(v)], lambda kept: kept[0](torch.ones(1))),
    "numpy array of no dimensions": (np.array, float),
    "numpy array of times": (lambda v: np.array([int(v)], dtype="m8[s]"), lambda kept: float(kept.astype(int)[0])),
    "own tuple": (lambda v: refusing(tuple, "__len__", "__iter__", "__contains__")((v,)), lambda kept: kept[0]),
    "own list": (lambda v: refusing(list, "__len__")((v,)), first),
    "own deque": (lambda v: refusing(collections.deque, "__len__")((v,)), first),
    "own set": (lambda v: refusing(set, "__eq__")((v,)), lambda kept: next(iter(kept))),
    "own dict": (
        lambda v: refusing(dict, "__len__", "__iter__", "__getitem__", "keys", "values")(gain=v),
        lambda kept: kept.get("gain"),
    ),
    "another rule": (lambda v: fastens.rules.Mean([v, 1 - v]), lambda kept: kept.weights[0]),
}  # fmt: skip


@functools.cache
def refusing(base, *names):
    """A class of containers that refuses what code can ask of its base, as some do whose length would be misread."""

    def refuse(self, *args):
        raise NotImplementedError

    return type("Refusing", (base,), dict.fromkeys(names, refuse))


def module_of(value):
    module = types.ModuleType("own")
    module.gain = value
    return module


def random_of(generator):
    import copy

    return copy.deepcopy(generator).random()


def own_layer(value):
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, value)
    return layer


def refused(make):
    with pytest.raises(ValueError, match=r"differs from member 0|closure|cannot be copied"):
        fastens.Ensemble([made(make, k) for k in range(K)], engine="fold")


@pytest.mark.parametrize("name", KEPT)
def test_what_members_keep(name):
    keep, find = KEPT[name]

    def make(k):
        return Keeps(keep(float(k + 1)), find)

    held = Held(make)
    assert held.ensemble.engine == "loop"
    assert held.warned
    held.sampling(VECTORS, 2)
    held.gradients(VECTORS)
    assert held.ensemble.verify(torch.randn(5, 4)) < 1e-5
    held.drawn(VECTORS)
    refused(make)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_flag_of_a_diffusers_configuration(rule):
    diffusers = pytest.importorskip("diffusers")

    def make(k):
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
            norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
            center_input_sample=k == 1,
        )  # fmt: skip

    held = Held(make)
    assert held.ensemble.engine == "loop"
    with torch.no_grad():
        for t in (1, 500):
            held.call(torch.randn(2, 1, 8, 8), t)
    refused(make)


def test_what_only_names_the_origin_is_no_difference():
    diffusers = pytest.importorskip("diffusers")

    def make(k):
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
            norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
        )  # fmt: skip
        network.register_to_config(_name_or_path=f"run-{k}")
        return network

    held = Held(make, engine="fold")
    with torch.no_grad():
        held.call(torch.randn(2, 1, 8, 8), 500)


def test_alike_state_of_every_kind_is_folded():
    alike = {name: each for name, each in KEPT.items() if name != "iterator"}
    looped = []
    for name, (keep, find) in alike.items():
        held = Held(lambda k, keep=keep, find=find: Keeps(keep(2.0), find))
        with torch.no_grad():
            held.call(torch.randn(5, 4))
        if held.ensemble.engine != "fold":
            looped.append(name)
    # not to be copied, of classes of their own, or not to be looked into
    assert set(looped) <= {"proxy", "module", "property of a class", "numpy generator"}


def test_members_are_not_the_first_one_under_another_name():
    """The loop's members, on demand and in files, keep their own Python."""
    held = Held(lambda k: Keeps([k + 1.0], first))
    x = torch.randn(5, 4)
    with torch.no_grad():
        near(averaged([member(x) for member in held.ensemble.members]), averaged(held.loop(x)))
        near(held.ensemble.member_outputs(x), torch.stack(held.loop(x)))
