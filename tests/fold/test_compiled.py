"""Whole ensembles go through ``torch.compile`` in one graph and through ``torch.export``, whatever the network."""

import functools
import inspect
import itertools
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._dynamo.exc import Unsupported

import fastens
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error


def in_turn(first):
    """Every other network; the others are for ``make test-full``."""
    return [pytest.param(name, marks=pytest.mark.full if (i + first) % 2 else ()) for i, name in enumerate(NETWORKS)]


def ensemble_of(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(2)]
    return fastens.Ensemble(members, engine="fold"), members, *arguments(2)


def compiled(module, args, kwargs):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def exported(module, args, kwargs):
    return torch.export.export(module, args, kwargs).module()


def check(run, ensemble, members, args, kwargs):
    expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members]).mean(0)
    assert relative_error(tensor_of(run(*args, **kwargs)), expected) < NETWORK[torch.float32]
    assert ensemble.engine == "fold"


@pytest.mark.parametrize("name", in_turn(0))
def test_compiles_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(compiled(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("name", in_turn(1))
def test_exports_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(exported(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("name", ["mlp", "transformer", "gru", "magnitude_preserving", "vision_blocks"])
def test_exports_with_a_named_batch(name):
    make, arguments = NETWORKS[name]
    ensemble = fastens.Ensemble([randomised(make, seed) for seed in range(2)], engine="fold")
    args, kwargs = arguments(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    given = inspect.signature(make().forward).bind(*args, **kwargs).arguments
    sizes = pytree.tree_map(lambda x: {0: batch} if isinstance(x, torch.Tensor) and x.ndim else None, given)
    with torch.no_grad():
        program = torch.export.export(ensemble, args, kwargs, dynamic_shapes=sizes).module()
        for count in (4, 2, 7):
            args, kwargs = arguments(count)
            assert (
                relative_error(tensor_of(program(*args, **kwargs)), tensor_of(ensemble(*args, **kwargs)))
                < NETWORK[torch.float32]
            )


@pytest.mark.parametrize("trace", [compiled, exported])
@pytest.mark.parametrize(
    "name", ["mlp", "transformer", "transformer_time_first", "gru_time_first", "edm_like", "vision_blocks"]
)
def test_traces_before_the_first_call(name, trace):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        check(trace(ensemble, args, kwargs), ensemble, members, args, kwargs)


class Layer(nn.Module):
    """What networks do in their forward that a graph may, or may not, hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.calls = 0
        self.register_buffer("number", torch.zeros(()))

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)))


class Linear(Layer):
    def forward(self, x):
        return 2 * self.linear(x)


class Counts(Layer):
    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class PutsBuffer(Layer):
    def forward(self, x):
        self.number = self.number + 1
        return self.linear(x) * self.number


class WritesBuffer(Layer):
    def forward(self, x):
        self.number.add_(1)
        return self.linear(x) * self.number


class Branches(Layer):
    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else 2 * y


class Encodes(Layer):
    def encode(self, x):
        return self.linear(x).sin()

    def forward(self, x):
        return self.linear(x), self.encode(x)


def ensemble(kind, make):
    members = [randomised(kind, seed).eval() for seed in range(3)]
    return make(members)


def different(member):
    """The same structure, of another class and with another forward where it returns one tensor."""
    kind = Linear if type(member) is Layer else type("Another", (type(member),), {})
    return randomised(kind, 5).eval()


MADE = {
    "fold": lambda members: fastens.Ensemble(members, engine="fold"),
    "loop": lambda members: fastens.Ensemble(members, engine="loop"),
    "view": lambda members: fastens.Ensemble(members, engine="loop").with_rule("median"),
    "training": lambda members: fastens.Ensemble(members, "geometric", engine="loop").train(),
    "different": lambda members: fastens.Ensemble([*members[:2], different(members[2])], engine="loop"),
    "masks": lambda members: fastens.MCDropout(nn.Sequential(nn.Dropout(0.3), members[0]), 3, engine="loop"),
}
BATCHES = [torch.randn(b, 2, generator=torch.Generator().manual_seed(b)) for b in (3, 5, 2, 16)]


def programs(ensemble, **options):
    torch._dynamo.reset()
    return torch.compile(ensemble, dynamic=True, backend="aot_eager", **options)


@pytest.mark.parametrize("made", MADE)
def test_every_engine_compiles_whole_with_a_dynamic_batch_and_gradients(made):
    """The loop too: members one by one are one graph. A trace of as many rows as members is another for other sizes."""
    run, expected = programs(ensemble(Layer, MADE[made]), fullgraph=True), ensemble(Layer, MADE[made])
    for x in BATCHES if made in ("fold", "loop") else [*BATCHES[1:], BATCHES[0]]:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x)
        (own,) = torch.autograd.grad(expected(x).square().sum(), x)
        assert relative_error(gradient, own) < NETWORK[torch.float32]


@pytest.mark.parametrize("kind", [Layer, WritesBuffer, Encodes])
@pytest.mark.parametrize("made", MADE)
def test_every_engine_exports_with_a_dynamic_batch(made, kind):
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        run = torch.export.export(ensemble(kind, MADE[made]), (BATCHES[0],), dynamic_shapes=sizes).module()
        expected = ensemble(kind, MADE[made])
        for x in BATCHES:
            for ours, theirs in zip(pytree.tree_leaves(run(x)), pytree.tree_leaves(expected(x)), strict=True):
                assert relative_error(ours, theirs) < NETWORK[torch.float32]


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *itertools.product([Counts, PutsBuffer, WritesBuffer, Branches], ["fold", "loop"]),
        (Branches, "auto"),
        *(pytest.param(kind, "auto", marks=pytest.mark.full) for kind in (Counts, PutsBuffer, WritesBuffer)),
    ],
)
def test_what_no_graph_repeats_is_called_outside_it_or_refused(kind, engine):
    """One member counts its calls in a graph; a graph of all members would count once."""
    make = functools.partial(fastens.Ensemble, engine=engine)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that members are looped
        called = ensemble(kind, make)
        expected = [called(x) for x in BATCHES]
        run = programs(ensemble(kind, make))
        assert all(relative_error(run(x), y) < NETWORK[torch.float32] for x, y in zip(BATCHES, expected, strict=True))
        if kind is WritesBuffer:
            return
        with pytest.raises(Unsupported, match=r"writes to itself|no one answer|data-dependent"):
            programs(ensemble(kind, make), fullgraph=True)(BATCHES[0])
        with pytest.raises(Exception, match=r"writes to itself|no one answer|data-dependent"):
            torch.export.export(ensemble(kind, make), (BATCHES[0],))


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_methods_are_called_outside_the_graph(engine):
    ens = ensemble(Encodes, functools.partial(fastens.Ensemble, engine=engine))
    torch._dynamo.reset()
    run = torch.compile(lambda x: ens.encode(x) + 1, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for x in BATCHES:
            assert relative_error(run(x), ens.encode(x) + 1) < NETWORK[torch.float32]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, shift, condition=None):
        return torch.tanh(self.inner(x) + shift) * condition["scale"]


@pytest.mark.parametrize("engine", ["fold", "loop", "modules"])
def test_what_each_member_has_its_own_of_is_in_the_graph(engine):
    members = [randomised(Shifted, seed) for seed in range(3)]
    if engine == "modules":
        members[1].other = nn.Linear(1, 1)
    ens = fastens.Ensemble(members, engine="fold" if engine == "fold" else "loop")
    torch._dynamo.reset()
    run = torch.compile(ens, fullgraph=engine != "modules", dynamic=True, backend="aot_eager")
    for rows in (5, 7):
        x, shifts = torch.randn(rows, 4, requires_grad=True), torch.randn(3, rows, 4)
        scales = [0.5, 1.0, 2.0]
        found = run(x, fastens.PerMember(list(shifts)), condition={"scale": fastens.PerMember(scales)})
        each = (m(x, shift, {"scale": s}) for m, shift, s in zip(members, shifts, scales, strict=True))
        expected = torch.stack(list(each)).mean(0)
        assert relative_error(found.detach(), expected.detach()) < NETWORK[torch.float32]
        theirs, ours = (torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, found))
        assert relative_error(ours, theirs) < NETWORK[torch.float32]


class Placed(nn.Module):
    """A network with buffers that no state dict has, as position embeddings are kept."""

    def __init__(self, persistent, seed=0):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("position", torch.randn(1, 4, generator=generator), persistent=persistent)
        self.register_buffer("scale", torch.full((1, 4), 2.0), persistent=persistent)

    def forward(self, x):
        return self.inner(x) + self.position[:, : x.shape[1]] * self.scale


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_exports_keep_what_no_state_dict_has(nested, persistent, engine, tmp_path):
    members = [randomised(functools.partial(Placed, persistent, seed), seed) for seed in range(3)]
    for seed, member in enumerate(members):
        member.position += seed
    ensemble = fastens.Ensemble(members, engine=engine)
    module = nn.Sequential(nn.Identity(), ensemble) if nested else ensemble
    with torch.no_grad():
        program = torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, tmp_path / "a.pt2")
        for run in (program.module(), torch.export.load(tmp_path / "a.pt2").module()):
            for batch in (3, 5):
                x = torch.randn(batch, 4)
                expected = torch.stack([member(x) for member in members]).mean(0)
                found = run(x)
                assert type(found) is torch.Tensor
                assert relative_error(found, expected) < NETWORK[torch.float32]
        assert relative_error(module(x), expected) < NETWORK[torch.float32]
