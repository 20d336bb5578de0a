"""Random lives of members that remember: what they write to themselves, among changes of all kinds."""

import copy
import functools
import pickle
from random import Random

import pytest
import torch
from torch import nn

from tests.fold.contract import Held, K, near

RELATIVE = 1e-4  # of networks that scale themselves up from call to call


class Box:
    """An object that knows its member, and counts."""

    def __init__(self, member):
        self.member, self.count = member, 0

    def __call__(self, x):
        self.count += 1
        return self.member.scaled(x) + 0.1 * self.count


class Remembering(nn.Module):
    """Does what its traits say, and leaves it behind."""

    def __init__(self, traits):
        super().__init__()
        self.layer, self.inner, self.norm = (
            nn.Linear(4, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            nn.BatchNorm1d(4),
        )
        self.register_buffer("average", torch.zeros(4))
        self.traits, self.scale, self.options, self.calls, self.past = traits, 1.0, {"shift": 0.0}, 0, []
        self.kept = self.cache = self.part = None
        self.held = [self.layer.weight]

    def scaled(self, x):
        return self.layer(x) * self.scale + self.options["shift"]

    def forward(self, x):
        for trait in self.traits:
            x = TRAITS[trait](self, x)
        return self.inner(x) * self.scale


def kept(make):
    """A function that is made of the member in its first call."""

    def trait(member, x):
        member.kept = make(member) if member.kept is None else member.kept
        return member.kept(x)

    return trait


def cached(make):
    def trait(member, x):
        member.cache = make(member, x) if member.cache is None else member.cache
        return x + member.cache

    return trait


def counts(member, x):
    member.calls += 1
    return x + 0.1 * member.calls


def lists(member, x):
    member.past.append(float(len(member.past)))
    return x + 0.01 * sum(member.past)


def averages(member, x):
    member.average = member.average * 0.9 + 0.1 * x.detach().mean(0)
    return x + member.average


def averages_in_place(member, x):
    with torch.no_grad():
        member.average.mul_(0.9).add_(0.1 * x.mean(0))
    return x + member.average


def makes_a_part(member, x):
    member.part = nn.ReLU() if member.part is None else member.part
    return member.part(x) * (2 if member.part.training else 1)


def reads(member, x):
    return x + 1 if float(member.layer.weight[0, 0]) > 1e9 else x


def scales(member, x):
    member.scale = member.scale * 1.01
    return x


TRAITS = {
    "method": kept(lambda member: member.scaled),
    "closure": kept(lambda member: lambda x: member.scaled(x)),
    "partial": kept(lambda member: functools.partial(Remembering.scaled, member)),
    "box": kept(Box),
    "cache of the input": cached(lambda member, x: x.detach().mean(0)),
    "cache of a weight": cached(lambda member, x: member.layer.weight.detach().clone().sum(0)),
    "counts": counts,
    "lists": lists,
    "averages": averages,
    "averages in place": averages_in_place,
    "makes a part": makes_a_part,
    "reads": reads,
    "scales": scales,
    "norm": lambda member, x: member.norm(x),
    "held": lambda member, x: x @ member.held[0].T,
}
FUNCTIONS = {"method", "closure", "partial", "box"}


def multiplied(module, factor):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)


def times(module, args, output):
    return output * 1.1


def inside(module):
    """What nothing notices, and is told."""
    module.options["shift"] = 0.7
    getattr(module, "refresh", lambda: None)()


def loaded(module, assign):
    state = {name: x * 1.05 if x.is_floating_point() else x.clone() for name, x in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


CHANGES = {
    "loaded": lambda module: loaded(module, False),
    "loaded by assignment": lambda module: loaded(module, True),
    "eps": lambda module: setattr(module.norm, "eps", 1e-2),
    "hook": lambda module: module.inner.register_forward_hook(times),
    "tied": lambda module: setattr(module.inner[0], "bias", module.layer.bias),
    "scale": lambda module: setattr(module, "scale", 1.3),
    "options": lambda module: setattr(module, "options", {"shift": 1.0}),
    "inside": inside,
    "function": lambda module: setattr(module, "kept", None),
    "cache": lambda module: setattr(module, "cache", None),
    "part": lambda module: setattr(module, "part", None),
    "past": lambda module: setattr(module, "past", []),
    "added to past": lambda module: module.past.append(2.5),
    "past emptied": lambda module: module.past.clear(),
    "another option": lambda module: module.options.update(shift=0.2),
    "calls": lambda module: setattr(module, "calls", 5),
    "average": lambda module: setattr(module, "average", torch.ones(4)),
    "appended": lambda module: module.inner.append(nn.Sigmoid()),
    "replaced": lambda module: module.inner.__setitem__(1, nn.GELU()),
    "weights": lambda module: multiplied(module, 1.1),
    "data": lambda module: setattr(module.layer.weight, "data", module.layer.weight.data * 1.05),
    "train": lambda module: module.train(),
    "eval": lambda module: module.eval(),
    "part of it trains": lambda module: module.inner.train(),
    "frozen": lambda module: module.requires_grad_(False),
    "trained": lambda module: module.requires_grad_(True),
}


def gradients(held, x):
    found, expected = held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0)
    near(found, expected, RELATIVE)
    names = [name for name, p in held.members[0].named_parameters() if p.requires_grad]
    if names and expected.requires_grad:  # what is frozen since may be kept trained
        own = [member.get_parameter(name) for name in names for member in held.members]
        theirs = torch.autograd.grad(expected.sum(), own, materialize_grads=True)
        stacks = dict(held.ensemble.network.named_parameters())
        ours = torch.autograd.grad(found.sum(), [stacks[name] for name in names], materialize_grads=True)
        scale = max(float(x.abs().max()) for x in theirs)
        for i, stack in enumerate(ours):
            assert float((stack - torch.stack(theirs[i * K : (i + 1) * K])).abs().max()) <= 1e-3 * max(scale, 1e-2)


def step(held, draw, generator):
    """One call, change, copy or look at a member."""
    what = draw.choice([*CHANGES, *["call"] * 12, *["gradients"] * 3, "copy", "pickle", "member"])
    x = torch.randn(draw.choice([5, 5, 3]), 4, generator=generator)
    if what in CHANGES:
        held.each(CHANGES[what])
    elif what == "gradients":
        gradients(held, x)
    elif what == "call":
        with torch.no_grad():
            near(held.ensemble(x), torch.stack([member(x) for member in held.members]).mean(0), RELATIVE)
    elif "closure" not in held.members[0].traits:  # of which a copy reaches the member that was copied
        if what == "member":
            k = draw.randrange(K)
            with torch.no_grad():
                near(held.ensemble.members[k](x), copy.deepcopy(held.members[k])(x), RELATIVE)
        else:
            way = copy.deepcopy if what == "copy" else lambda module: pickle.loads(pickle.dumps(module))
            held.ensemble, held.members = way(held.ensemble), [way(member) for member in held.members]


@pytest.mark.parametrize("seed", range(60))
def test_lives_of_members_that_remember(seed):
    draw = Random(seed)
    traits = draw.sample(sorted(TRAITS), draw.randint(1, 4))
    traits = [t for t in traits if t not in FUNCTIONS][:3] + [t for t in traits if t in FUNCTIONS][:1]
    held = Held(lambda k: Remembering(traits), engine=draw.choice(["auto", "auto", "loop"]))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw.randint(8, 20)):
        held.quietly(lambda: step(held, draw, generator))


def test_a_buffer_that_is_put_in_is_each_members_own_whoever_looks_first():
    held = Held(lambda k: Remembering(["averages in place", "closure"]))
    for change in ("scale", "average"):
        held.each(CHANGES[change])
        assert len(held.ensemble.inner) == 2
        held.quietly(lambda: gradients(held, torch.randn(5, 4)))
        held.quietly(lambda: gradients(held, torch.randn(5, 4)))
