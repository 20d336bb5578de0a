"""What looped members keep of weights and of each other's objects stays so, whatever the network is given later."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.fold.contract import Held, near


class Box:
    def __init__(self, weight):
        self.weight, self.count = weight, 0


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.log: list[float] | None = None

    def forward(self, x):
        if self.log is not None:
            self.log.append(1.0)
        return self.layer(x)


class Log(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x):
        self.log.append(2.0)
        return x + len(self.log)


class Logging(nn.Module):
    """Layers that log to one list, where they are given one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Layer(), Layer(), None
        self.log, self.records, self.extra, self.calls = [], {"log": [0.0]}, [], 0
        self.a.log = self.log

    def forward(self, x):
        self.calls += 1
        self.records["log"].append(2.0)
        x = self.b(self.a(x))
        x = x if self.c is None else self.c(x)
        return x + self.calls + 0.1 * len(self.log) + 0.3 * len(self.extra)


def one_list(module):
    module.log = module.a.log = module.b.log = []


def another_attribute(module):
    module.extra = module.log


def another_module(module):
    module.b.log = module.log


def inside_another(module):
    module.extra = module.records["log"]


def new_module(module):
    module.c = Log(module.log)


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("change", [one_list, another_attribute, another_module, inside_another, new_module])
def test_an_object_that_the_network_is_given_is_the_one_that_members_have(change, calls):
    held = Held(lambda k: Logging(), engine="loop")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(calls + 3):
            if i == calls:
                for module in (held.ensemble.network, *held.members):
                    change(module)
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0))


class Holding(nn.Module):
    """Holds a weight beside its tables, in what it writes to."""

    def __init__(self, where):
        super().__init__()
        self.layer, self.scale, self.where = nn.Linear(4, 4), 1.0, where
        weight = self.layer.weight
        self.held = {"list": [weight], "dict": {"weight": weight, "count": 0}, "box": Box(weight),
                     "tuple": [(weight,)], "box in a list": [Box(weight)]}[where]  # fmt: skip

    def weight(self):
        """The weight, and how often it was asked for."""
        held = self.held[0] if self.where == "box in a list" else self.held
        if isinstance(held, Box):
            held.count += 1
            return held.weight, held.count
        if isinstance(held, dict):
            held["count"] += 1
            return held["weight"], held["count"]
        held.append(1.0)
        return held[0][0] if self.where == "tuple" else held[0], len(held)

    def forward(self, x):
        weight, count = self.weight()
        return self.layer(x) * self.scale + x @ weight.T + count


def multiplied(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)


CHANGES = {
    "scale": lambda module: setattr(module, "scale", 1.3),
    "weights": multiplied,
    "memory": lambda module: setattr(module.layer.weight, "data", module.layer.weight.data * 1.1),
    "dtype": lambda module: module.double(),
    "frozen": lambda module: module.requires_grad_(False),
    "copy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("where", ["list", "dict", "box", "tuple", "box in a list"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode])
def test_what_holds_a_weight_is_kept_and_the_weight_is_the_members(change, where, scope):
    held = Held(lambda k: Holding(where), engine="loop")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def step():
        with scope():
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0))

    held.quietly(step)
    made = [CHANGES[change](each) for each in (held.ensemble, *held.members)]
    if change in ("copy", "pickle"):
        held.ensemble, *held.members = made
    x = x.to(next(held.members[0].parameters()).dtype)
    held.quietly(step)
    for each in (held.ensemble, *held.members):
        CHANGES["weights"](each)
    found, expected = held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0)
    near(found, expected)
    if expected.requires_grad:
        theirs = torch.autograd.grad(expected.sum(), [member.get_parameter("layer.weight") for member in held.members])
        stack = dict(held.ensemble.network.named_parameters())["layer.weight"]
        near(torch.autograd.grad(found.sum(), stack)[0], torch.stack(theirs))


class HoldingBuffer(nn.Module):
    """Holds a buffer of its own, which is the same in all members, in an attribute."""

    def __init__(self, counts):
        super().__init__()
        self.layer, self.counts, self.count = nn.Linear(4, 4), counts, 0
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.ones(4))
        self.held = {"shift": (self.shift, 1.0)}

    def forward(self, x):
        if self.counts:
            self.count += 1
        return self.layer(x) + self.held["shift"][0] * (1 + self.count)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_shared_buffer_that_each_member_gets_is_what_attributes_hold(counts, engine, calls):
    held = Held(lambda k: HoldingBuffer(counts), engine=engine)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(calls + 2):
            if i == calls:
                for module in (held.ensemble, *held.members):
                    next(module.buffers()).mul_(2)
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0))


class Referring(nn.Module):
    """Keeps a list that is its own, and another module's, with what only it has."""

    def __init__(self):
        super().__init__()
        self.a, self.log, self.kept = Layer(), [], None
        self.a.log, self.part = self.log, nn.Tanh()

    def forward(self, x):
        if self.kept is None:
            self.kept = self.log, Box(self.part)
        log, box = self.kept
        box.count += 1
        return self.a(x) + 0.1 * len(log) + box.count


@pytest.mark.parametrize("way", ["copy", "member"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_copies_keep_is_shared_in_them_as_in_the_members(way, engine):
    held = Held(lambda k: Referring(), engine=engine)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held.ensemble(x)
        for member in held.members:
            member(x)
        held.each(lambda module: setattr(module, "part", None))
        if way == "member":
            found, expected = held.ensemble.members[1], copy.deepcopy(held.members[1])
            for _ in range(3):
                near(found(x), expected(x))
            return
        held.ensemble, *held.members = [CHANGES[way](each) for each in (held.ensemble, *held.members)]
        for _ in range(3):
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0))
