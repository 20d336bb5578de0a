"""What is called and set on an ensemble as on a member: methods, setters, hooks."""

import copy
import warnings
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, near
from tests.fold.test_contract_modes import VECTORS


class Network(nn.Module):
    """What samplers and their users ask of a network beside ``forward``."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.free, self.processor = nn.Linear(4, 4), 1.0, None, None
        self.sigmas = torch.linspace(0.1, 2.0, 5)
        self.register_buffer("levels", torch.linspace(0.1, 2.0, 5))

    def forward(self, x, t=1.0):
        h = self.inner(x) * self.scale * t
        if self.free is not None:
            h = torch.cat([self.free * h[:, :2], h[:, 2:]], 1)
        return h if self.processor is None else self.processor(h)

    def velocity(self, x, t=1.0):
        return self.forward(x, t) - x

    def called(self, x):
        return {"velocity": self(x).tanh(), "input": x, "name": "v"}

    def _forward(self, x):
        return self.inner(x).square().mean(0)

    def statistics(self, x):
        h = self.inner(x)
        return h.mean(0), [h.std(), x.argmax(1)], len(h)

    def round_sigma(self, sigma):
        return self.levels[(self.levels - sigma.reshape(-1, 1)).abs().argmin(1)]

    def enable_free(self, by):
        self.free = by

    def disable_free(self):
        self.free = None

    def set_processor(self, processor):
        self.processor = processor

    @torch.no_grad()
    def sample(self, x, steps=3):
        for i in range(steps):
            x = x + 0.1 * self(x, 1 / (i + 1))
        return x


@pytest.mark.parametrize("engine", ["auto", "fold", "loop", "apart"])
@pytest.mark.parametrize("method", ["velocity", "called", "_forward", "round_sigma"])
def test_methods_are_combined(method, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    for first in (method, "__call__", method):
        for seed in range(2):
            with torch.no_grad():
                held.call(*VECTORS(torch.Generator().manual_seed(seed)), method=first)
    held.call(torch.randn(5, 4), method=method)


def differing(network, k):
    network.apart = k
    return network


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_methods_that_return_several_things(engine):
    held = Held(lambda k: Network(), engine=engine)
    x = torch.randn(5, 4)
    outputs = held.loop(x, method="statistics")
    found = held.ensemble.statistics(x)
    near(found[0], torch.stack([o[0] for o in outputs]).mean(0))
    near(found[1][0], torch.stack([o[1][0] for o in outputs]).mean(0))
    near(found[1][1], outputs[0][1][1])
    assert found[2] == 5


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_indices_that_differ_between_members_are_an_error(engine):
    held = Held(lambda k: Network(), engine=engine)
    held.each(lambda module: module.set_processor(lambda h: h.argmax(1)))
    with pytest.raises(TypeError, match=r"members return different torch\.int64 tensors"):
        held.ensemble(torch.randn(5, 4))


SETTERS = {
    "method": (lambda m: m.enable_free(0.5), lambda m: m.disable_free()),
    "processor": (lambda m: m.set_processor(torch.tanh), lambda m: m.set_processor(None)),
    "closure": (lambda m: m.set_processor(lambda h: h - h.mean(0)), lambda m: m.set_processor(torch.sin)),
    "attribute": (lambda m: setattr(m, "scale", 3.0), lambda m: setattr(m, "scale", 1.0)),
    "of a layer": (lambda m: setattr(inside(m)[0].inner, "forward", torch.tanh) or spread(m), lambda m: unpatched(m)),
}  # fmt: skip


def inside(m) -> list[Any]:
    """The modules that hold the members' Python."""
    if not isinstance(m, fastens.Ensemble):
        return [m]
    network: Any = m.network
    return [network] if m._engine is not None else list(network.children())


def spread(m):
    for each in inside(m):
        each.inner.forward = torch.tanh


def unpatched(m):
    for each in inside(m):
        del each.inner.forward


@pytest.mark.parametrize("engine", ["auto", "loop", "apart"])
@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "after some calls"])
@pytest.mark.parametrize("name", SETTERS)
def test_setters_reach_all_members_and_are_noticed(name, first, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    if not first:
        held.sampling(VECTORS)
    before = held.ensemble.engine
    for change in SETTERS[name] * 2:
        held.each(change)
        held.sampling(VECTORS)
        held.gradients(VECTORS)
    assert held.ensemble.engine == before
    assert held.ensemble.scale == held.members[0].scale


def test_setters_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    def make(k):
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        )  # fmt: skip

    held = Held(make, 2, engine="fold")
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 3, 8)
    changes = [
        lambda m: None,
        lambda m: m.enable_freeu(0.9, 0.2, 1.5, 1.6),
        lambda m: m.set_attn_processor(AttnProcessor()),
        lambda m: (m.disable_freeu(), m.set_attn_processor(AttnProcessor2_0())),
    ]
    results = []
    with torch.no_grad():
        for change in changes:
            held.each(change)
            results.append(held.call(x, t, c).sample)
    assert (results[1] - results[0]).abs().max() > 1e-3 * results[0].abs().max()


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda module, args, output: 2 * output),
    "forward with keywords": lambda m, seen: m.register_forward_hook(
        lambda module, args, kwargs, output: output + 1, with_kwargs=True),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:])),
    "mixing": lambda m, seen: m.register_forward_hook(lambda module, args, output: output - output.mean(0)),
    "looking": lambda m, seen: m.register_forward_hook(lambda module, args, output: seen.append(output.shape)),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "loop", "apart"])
@pytest.mark.parametrize("where", ["a layer", "the whole"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_run_in_fold_and_loop_and_leave_no_trace(name, where, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    held.sampling(VECTORS)
    before, seen, handles = held.ensemble.engine, [], []
    for module in (*held.members, *inside(held.ensemble)):
        handles.append(HOOKS[name](module if where == "the whole" else module.inner, seen))
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    if name == "looking":
        assert seen
        assert set(seen) == {torch.Size([5, 4])}
    for handle in handles:
        handle.remove()
    held.sampling(VECTORS)
    assert held.ensemble.engine == before
    assert not any("looped" in w or "one by one" in w for w in held.warned) or engine == "apart"


def test_a_hook_on_the_ensemble_itself_is_the_ensembles():
    held = Held(lambda k: Network())
    x = torch.randn(5, 4)
    handle = held.ensemble.register_forward_hook(lambda module, args, output: output + 1)
    expected = torch.stack(held.loop(x)).mean(0) + 1
    near(held.ensemble(x), expected)
    handle.remove()


class Scoped(nn.Module):
    """Methods without tensors whose code runs later, or returns tensors."""

    def __init__(self, width=4):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, width), nn.Linear(width, 4)
        self.options, self.scale = {"scale": 1.0}, 1.0

    def forward(self, x):
        return self.outer(self.inner(x).tanh()) * self.options["scale"] * self.scale

    def set_option(self, value):
        self.options["scale"] = value

    @contextmanager
    def option(self, value):
        kept, self.options["scale"] = self.options["scale"], value
        try:
            yield self
        finally:
            self.options["scale"] = kept

    @contextmanager
    def attribute(self, value):
        kept, self.scale = self.scale, value
        try:
            yield self
        finally:
            self.scale = kept

    @contextmanager
    def weights(self, value):
        """As a scope of averaged weights writes them."""
        kept = self.outer.weight.detach().clone()
        self.outer.weight.data.mul_(value)
        try:
            yield self
        finally:
            self.outer.weight.data.copy_(kept)

    def options_in_turn(self):
        for value in (3.0, 2.0, 1.0):
            self.options["scale"] = value
            yield value

    def sample(self, rows):
        x = torch.linspace(-1.0, 1.0, 4).expand(rows, 4)
        for _ in range(3):
            x = x + self(x)
        return {"sample": x, "rows": rows}

    def steps(self, rows):
        x = torch.linspace(-1.0, 1.0, 4).expand(rows, 4)
        for _ in range(3):
            x = x + self(x)
            yield x

    def sampled_in_steps(self, rows):
        return list(self.steps(rows))[-1]


def scoped(engine):
    """Members, and an ensemble of copies of them that has been called."""
    members = []
    for k in range(3):
        torch.manual_seed(k)
        members.append(Scoped(6 if engine == "apart" and k == 0 else 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine.replace("apart", "auto"))
    agree(ensemble, members)
    return ensemble, members


def agree(ensemble, members):
    x = torch.linspace(-2.0, 2.0, 12).reshape(3, 4)
    with torch.no_grad():
        for _ in range(2):
            near(ensemble(x), torch.stack([member(x) for member in members]).mean(0))


ENGINES = pytest.mark.parametrize("engine", ["auto", "loop", "apart"])


@ENGINES
def test_a_method_that_writes_where_nothing_tells_reaches_all_members(engine):
    ensemble, members = scoped(engine)
    for value in (3.0, 1.0):
        for each in (ensemble, *members):
            each.set_option(value)
        agree(ensemble, members)


@ENGINES
@pytest.mark.parametrize("method", ["option", "attribute", "weights"])
def test_context_managers_of_members_are_entered_and_left_for_all(method, engine):
    ensemble, members = scoped(engine)
    for value in (3.0, 2.0):
        with ExitStack() as entered:
            for each in (ensemble, *members):
                assert entered.enter_context(getattr(each, method)(value)) is each
            agree(ensemble, members)
        agree(ensemble, members)
    with pytest.raises(ZeroDivisionError), getattr(ensemble, method)(3.0):
        raise ZeroDivisionError
    agree(ensemble, members)


@ENGINES
def test_generators_of_members_run_for_all(engine):
    ensemble, members = scoped(engine)
    values = []
    for value, *_ in zip(ensemble.options_in_turn(), *(member.options_in_turn() for member in members), strict=True):
        values.append(value)
        agree(ensemble, members)
    assert values == [3.0, 2.0, 1.0]
    with torch.no_grad():
        found, theirs = list(ensemble.steps(2)), [list(member.steps(2)) for member in members]
    for x, *expected in zip(found, *theirs, strict=True):
        near(x, torch.stack(expected).mean(0))


@ENGINES
def test_what_a_method_without_tensors_returns_is_combined(engine):
    ensemble, members = scoped(engine)
    with torch.no_grad():
        found = ensemble.sample(2)
        near(found["sample"], torch.stack([member.sample(2)["sample"] for member in members]).mean(0))
        near(ensemble.sampled_in_steps(2), torch.stack([member.sampled_in_steps(2) for member in members]).mean(0))
    assert found["rows"] == 2
    assert type(found["sample"]) is torch.Tensor
